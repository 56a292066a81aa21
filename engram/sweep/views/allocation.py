"""Loss against the experts' share, a curve for each budget: where the optimum lies, and whether it moves."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engram.sweep import paper
from engram.sweep.judge import Allocation, Move, compare, judge
from engram.sweep.paired import Interval
from engram.sweep.views.points import Points
from engram.sweep.views.words import compared

AXIS = "rho"
# Activated over sparse parameters of the paper's allocation models, as counted on configs/paper/allocation_*.yaml.
PAPERS_SHARE = 0.11
# A curve needs as many ratios.
_FEWEST = 3
# Of the table of a part; costs are of the fitted curve, above its minimum, in nats per token.
_ROWS = (
    "runs",
    "verdict",
    "minimum at",
    "cost of experts only",
    "cost of the paper's 0.8",
    "cost of the parabola's minimum",
    "noise of a run",
    "lowest measured",
    "not resolved from it",
)


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
        if self.judged.against_moe is not None and self.judged.best != 1:
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

    @property
    def findings(self) -> list[str]:
        named = [f"{curve.name}: {curve.says}" if curve.name else curve.says for curve in self.curves]
        return named + [f"from {first} to {second}, {move.says}" for first, second, move in self.moves]

    def as_dict(self) -> dict[str, Any]:
        return {
            "view": "allocation",
            "runs": self.points.finished,
            "of": self.points.loss.size,
            "findings": self.findings,
            "curves": [
                {
                    "name": curve.name,
                    "runs": curve.points.finished,
                    "of": curve.points.loss.size,
                    "says": curve.says,
                    "fit": curve.judged.as_dict() if curve.judged else None,
                }
                for curve in self.curves
            ],
            "moves": [{"from": first, "to": second, **move.as_dict()} for first, second, move in self.moves],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A column for each budget."""
        columns = [_cells(curve) for curve in self.curves]
        return ["", *(curve.name or "loss" for curve in self.curves)], [
            list(row) for row in zip(_ROWS, *columns, strict=True)
        ]

    def warnings(self) -> list[str]:
        return [
            f"{curve.name}: {note}" if curve.name else note
            for curve in self.curves
            for note in (curve.judged.warnings if curve.judged else (curve.says,))
        ]

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


def allocation_view(name: str, points: Points) -> AllocationView:
    """All axes but `rho` are budgets."""
    curves = tuple(_curve(label, held) for label, held in points.split(AXIS).items())
    judged = [(curve.name, curve.judged) for curve in curves if curve.judged]
    moves = [(first[0], second[0], compare(first[1], second[1])) for first, second in pairwise(judged)]
    return AllocationView(name, points, curves, tuple(moves))


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


def _cells(curve: Curve) -> list[str]:
    found, runs = curve.judged, curve.points.count.removesuffix(" runs")
    if found is None:
        return [runs, "too few ratios", *["–"] * (len(_ROWS) - 2)]
    place = _with_interval(f"{found.argmin:.3f}", found.argmin_interval)
    regrets = (found.regret_moe, found.regret_paper, found.regret_parabola)
    costs = ["–" if regret is None else _with_interval(f"{regret.loss:.4f}", regret.interval, 4) for regret in regrets]
    noise = "–" if found.seed_sd is None else f"{found.seed_sd:.4f}"
    tied = ", ".join(f"{share:.2f}" for share in found.tied) or "none"
    return [runs, found.verdict, place, *costs, noise, f"{found.best:.2f}", tied]


def _with_interval(text: str, interval: Interval | None, digits: int = 3) -> str:
    if interval is None:
        return text
    return f"{text} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
