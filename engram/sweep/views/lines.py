"""Losses along one axis, a line for each combination of the others: which point is best, and which are no worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.sweep import paper
from engram.sweep.paired import Difference
from engram.sweep.simultaneous import tied_with
from engram.sweep.spec import Part
from engram.sweep.views.head import NONE, divergence, head, lost_runs, named, summaries
from engram.sweep.views.points import Losses, Points
from engram.sweep.views.reference import differences_from, is_same, reference_point
from engram.sweep.words import compared, listed

# Lines further apart than this many times their own range are no competitors: each is read on its own.
_APART = 3.0


@dataclass(frozen=True)
class Line:
    """One curve, by ascending `x`."""

    name: str
    x: tuple[float, ...]
    ticks: tuple[str, ...]
    points: Points


@dataclass(frozen=True)
class Contest:
    """Lines that lie near each other, and the best of all their points."""

    lines: tuple[Line, ...]
    # The point of the lowest mean, and those that are not resolved from it, all compared at once.
    best: str
    tied: tuple[str, ...]
    # The best minus the reference, with the interval of all points' differences from it at once; None without a
    # reference, and where that itself is the best.
    gain: Difference | None
    reference: str | None
    is_reference: bool
    seeds: int
    # Points with a finished run.
    finished: int

    @property
    def says(self) -> str:
        if self.finished < 2:
            return f"{self.best}: no other finished point to compare it with"
        text = f"lowest at {self.best}"
        if self.gain is not None and self.reference is not None:
            text += f", {compared(self.gain, self.reference)}"
        elif self.is_reference:
            text += ", the reference itself"
        if self.seeds < 2:
            return text if self.gain else f"{text} (one seed: not resolved)"
        return (
            f"{text}; {f'not resolved from {listed(self.tied)}' if self.tied else 'measurably lower than all others'}"
        )


@dataclass(frozen=True)
class Lines:
    """What a part with `view: lines` says."""

    name: str
    points: Points
    axis: str
    # False: the axis has names, which stand at 0, 1, 2, ...
    numeric: bool
    contests: tuple[Contest, ...]
    # The reference that all lines share, by name, and its losses by the points' seeds.
    reference: str | None
    baseline: Losses | None
    # Layer and loss of the paper's sweep, where the part asks for it.
    paper: paper.Curve | None

    @property
    def findings(self) -> list[str]:
        alone = len(self.contests) == 1
        says = [contest.says if alone else named(contest.lines[0].name, contest.says) for contest in self.contests]
        return [*says, *divergence(self.points)]

    def as_dict(self) -> dict[str, Any]:
        return {
            **head("lines", self.points, self.findings),
            "axis": self.axis,
            "reference": self.reference,
            "contests": [
                {
                    "lines": [line.name for line in contest.lines],
                    "best": contest.best,
                    "tied": list(contest.tied),
                    "from_reference": contest.gain.as_dict() if contest.gain else None,
                }
                for contest in self.contests
            ],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Mean, sd and number of seeds: a row for each line, a column for each value of the axis."""
        ticks = list(dict.fromkeys(tick for contest in self.contests for line in contest.lines for tick in line.ticks))
        rows = []
        for line in (line for contest in self.contests for line in contest.lines):
            cells = dict(zip(line.ticks, (summary.says for summary in summaries(line.points)), strict=True))
            rows.append([line.name or "mean ± sd (seeds)", *(cells.get(tick, NONE) for tick in ticks)])
        return [self.axis, *ticks], rows

    def warnings(self) -> list[str]:
        few = min((contest.seeds for contest in self.contests), default=0)
        notes = [f"{few} seed{'s' if few > 1 else ''}"] if 0 < few < 3 else []
        return [
            *lost_runs(self.points),
            *notes,
            *([self.points.count] if self.points.finished < self.points.loss.size else []),
        ]


def lines_view(name: str, part: Part, everything: Mapping[str, Points]) -> Lines:
    """The first axis of numbers lies along x; without `reference`, lines have no baseline."""
    points = everything[name]
    numeric = [axis for axis in points.axes if all(_number(value) is not None for value in points.axis(axis))]
    axis = (numeric or list(points.axes) or [""])[0]
    held = reference_point(part, name, 0, everything) if part.reference is not None and points.rows else None
    lines = [_line(label, curve, axis, bool(numeric)) for label, curve in points.split(axis).items()]
    lines = [line for line in lines if line.points.finished]
    groups = [[line] for line in lines] if _far_apart(lines) else [lines] if lines else []
    return Lines(
        name=name,
        points=points,
        axis=axis,
        numeric=bool(numeric),
        contests=tuple(_contest(group, held) for group in groups),
        reference=held[0].label(held[1]) if held else None,
        baseline=held[0].by_seed(held[1], points.seeds) if held else None,
        paper=paper.layers() if part.paper else None,
    )


def _line(label: str, curve: Points, axis: str, numeric: bool) -> Line:
    values = curve.axis(axis) if axis else [curve.label(index) for index in range(len(curve.rows))]
    places = [(_number(value) or 0.0) if numeric else float(index) for index, value in enumerate(values)]
    order = sorted(range(len(places)), key=places.__getitem__)
    ticks = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return Line(
        name=label,
        x=tuple(places[index] for index in order),
        ticks=tuple(ticks[index] for index in order),
        points=curve.take(order),
    )


def _contest(lines: Sequence[Line], held: tuple[Points, int] | None) -> Contest:
    """Lines with at least one finished run among them."""
    seeds = lines[0].points.seeds
    whole = Points(
        lines[0].points.axes,
        tuple(row for line in lines for row in line.points.rows),
        seeds,
        np.concatenate([line.points.loss for line in lines]),
    )
    labels = [f"{tick} ({line.name})" if len(lines) > 1 else tick for line in lines for tick in line.ticks]
    best = whole.lowest()
    same = [index for index in range(len(labels)) if held and is_same(whole, index, *held)]
    others = {index: held for index in range(len(labels)) if held and index not in same}
    return Contest(
        lines=tuple(lines),
        best=labels[best],
        # What lies between the best and the reference is said by their own difference.
        tied=tuple(labels[index] for index in tied_with(whole.loss, best) if index not in same),
        gain=differences_from(whole, others)[best] if best in others else None,
        reference=held[0].label(held[1]) if held else None,
        is_reference=best in same,
        seeds=int(np.isfinite(whole.loss).any(axis=0).sum()),
        finished=int(np.isfinite(whole.loss).any(axis=1).sum()),
    )


def _far_apart(lines: Sequence[Line]) -> bool:
    if len(lines) < 2:
        return False
    losses = [line.points.loss[np.isfinite(line.points.loss)] for line in lines]
    ranges = [(finite.min(), finite.max()) for finite in losses]
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges)
    return bool(whole > _APART * max(high - low for low, high in ranges))


def _number(value: Any) -> float | None:
    """Names such as "0" and "1" count as numbers."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
