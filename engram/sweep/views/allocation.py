"""Loss against the experts' share, a curve for each budget: where the optimum lies, and whether it moves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engram.sweep import paper
from engram.sweep.costs import Within
from engram.sweep.judge import Allocation, judge
from engram.sweep.move import Move, compare
from engram.sweep.paired import Interval
from engram.sweep.spec import Part
from engram.sweep.views.head import NONE, curve_head, divergence, head, lost_runs, named, side_by_side
from engram.sweep.views.points import Points
from engram.sweep.words import compared

AXIS = "rho"
# Activated over sparse parameters of the paper's allocation models, as counted on configs/paper/allocation_*.yaml.
PAPERS_SHARE = 0.11
# A curve needs as many ratios.
_FEWEST = 3


@dataclass(frozen=True)
class Curve:
    """One budget, by ascending share; `judged` is None where too few ratios are finished."""

    name: str
    points: Points
    # As counted on the models, which have whole experts.
    rho: tuple[float, ...]
    judged: Allocation | None

    @property
    def pure(self) -> int | None:
        """Position of the model without memory."""
        return self.rho.index(1.0) if 1.0 in self.rho else None

    @property
    def band(self) -> Interval | None:
        """Where the minimum lies; None where the seeds do not say that there is one."""
        return self.judged.argmin_interval if self.judged and self.judged.verdict != "not resolved" else None

    @property
    def says(self) -> str:
        if self.judged is None:
            return f"{self.points.count}, {_FEWEST} ratios are needed for a curve"
        text = self.judged.says
        if self.judged.against_moe is not None:
            text += f"; measured at {self.judged.best:.2f}: {compared(self.judged.against_moe, 'experts only')}"
        return text

    @property
    def title(self) -> str:
        """The finding in a line or two."""
        found = self.judged
        if found is None:
            return self.says
        place, regret = f"{found.argmin:.2f}", found.regret_moe
        gain = f", {regret.loss:.3f} nat below experts only" if regret else ""
        if found.seeds == 1:
            return f"minimum of the fit at {place}{gain} (one seed)"
        if found.verdict == "not resolved":
            return found.says
        if found.verdict == "no interior minimum" or found.argmin_interval is None:
            lower = found.at_ends is not None and found.at_ends[0] > found.at_ends[1]
            return f"no interior minimum: lowest at the end of the range, {found.rho[0 if lower else -1]:.2f}"
        low, high = found.argmin_interval
        return f"minimum at {place} ({low:.2f} to {high:.2f}){gain}"


@dataclass(frozen=True)
class AllocationView:
    """What a part with `view: allocation` says."""

    name: str
    points: Points
    curves: tuple[Curve, ...]
    # Between neighbouring budgets: names, and whether the optimum moves.
    moves: tuple[tuple[str, str, Move], ...]
    # The paper's own, where the part asks for them.
    paper: tuple[Curve, ...]

    @property
    def findings(self) -> list[str]:
        moves = [f"from {first} to {second}, {move.says}" for first, second, move in self.moves]
        return [*(named(curve.name, curve.says) for curve in self.curves), *moves, *divergence(self.points)]

    def as_dict(self) -> dict[str, Any]:
        return {
            **head("allocation", self.points, self.findings),
            "curves": [
                {
                    **curve_head(curve.name, curve.points, curve.says),
                    "fit": curve.judged.as_dict() if curve.judged else None,
                }
                for curve in self.curves
            ],
            "moves": [{"from": first, "to": second, **move.as_dict()} for first, second, move in self.moves],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A column for each budget; costs are of the fitted curve, above its minimum, in nats per token."""
        return side_by_side({curve.name: _cells(curve) for curve in self.curves})

    def warnings(self) -> list[str]:
        notes = [(curve.name, curve.judged.warnings if curve.judged else (curve.says,)) for curve in self.curves]
        return [*lost_runs(self.points), *(named(name, note) for name, several in notes for note in several)]

    def tiles(self) -> Iterator[tuple[str, str]]:
        for curve in self.curves:
            found = curve.judged
            if found is None:
                continue
            label = "experts' share at the minimum" + (f", {curve.name}" if curve.name else "")
            if found.verdict != "interior minimum" or found.argmin_interval is None:
                yield found.verdict, label
                continue
            low, high = found.argmin_interval
            yield f"{found.argmin:.2f}", f"{label} ({low:.2f} to {high:.2f})"
            if found.regret_moe:
                yield f"{found.regret_moe.loss:.3f} nat", f"below experts only{f', {curve.name}' if curve.name else ''}"


def allocation_view(name: str, part: Part, everything: Mapping[str, Points]) -> AllocationView:
    """All axes but `rho` are budgets."""
    points = everything[name]
    curves = tuple(_curve(label, held) for label, held in points.split(AXIS).items())
    judged = [(curve.name, curve.judged) for curve in curves if curve.judged]
    moves = [(first[0], second[0], compare(first[1], second[1])) for first, second in pairwise(judged)]
    return AllocationView(name, points, curves, tuple(moves), paper_curves() if part.paper else ())


def paper_curves() -> tuple[Curve, ...]:
    """The paper's budgets, judged as ours are; one run for each point."""
    curves = []
    for budget, (rho, loss) in paper.allocation().items():
        rows = tuple({"rho_counted": float(share)} for share in rho)
        curves.append(_curve(f"paper, {budget} FLOPs", Points((), rows, (0,), loss[:, None])))
    return tuple(curves)


def _curve(name: str, points: Points) -> Curve:
    shares = points.column("rho_counted")
    points = points.take(sorted(range(len(shares)), key=shares.__getitem__))
    finished = np.isfinite(points.loss).any(axis=1)
    rho = np.array(points.column("rho_counted"))
    enough = len(np.unique(rho[finished])) >= _FEWEST
    return Curve(
        name,
        points,
        tuple(rho.tolist()),
        judge(rho, points.loss, activated_share=_activated_share(points)) if enough else None,
    )


def _activated_share(points: Points) -> float:
    """Activated over sparse parameters: p0 of the curve. The paper's models, of which no counts are kept, have 0.11."""
    row = points.rows[0]
    return row["activated"] / row["sparse"] if row.get("sparse") else PAPERS_SHARE


def _cells(curve: Curve) -> dict[str, str]:
    """By the names of the table's rows."""
    found = curve.judged
    lost = [f"{rho:.2f} ({count})" for rho, count in zip(curve.rho, curve.points.diverged, strict=True) if count]
    cells = {"runs": curve.points.count.removesuffix(" runs"), "diverged at": ", ".join(lost) or "none"}
    if found is None:
        return {**cells, "verdict": "too few ratios"}
    regrets = {
        "cost of experts only": found.regret_moe,
        "cost of the paper's 0.8": found.regret_paper,
        "cost of the parabola's minimum": found.regret_parabola,
    }
    return {
        **cells,
        "verdict": found.verdict,
        "minimum at": _with_interval(f"{found.argmin:.3f}", found.argmin_interval),
        **{f"within {near.nat:g} of it": _range(near) for near in found.within},
        **{
            name: _with_interval(f"{regret.loss:.4f}", regret.interval, 4) if regret else NONE
            for name, regret in regrets.items()
        },
        "noise of a run": NONE if found.seed_sd is None else f"{found.seed_sd:.4f}",
        "lowest measured": f"{found.best:.2f}",
        "not resolved from it": ", ".join(f"{share:.2f}" for share in found.tied) or "none",
    }


def _range(near: Within) -> str:
    """`0.00 (0.00 to 0.10) to 0.31 (0.20 to 0.50)`."""
    return " to ".join(
        _with_interval(f"{end:.2f}", interval, 2)
        for end, interval in ((near.low, near.low_interval), (near.high, near.high_interval))
    )


def _with_interval(text: str, interval: Interval | None, digits: int = 3) -> str:
    if interval is None:
        return text
    return f"{text} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
