"""Loss against the rows of n-gram tables: how much more memory buys, and what kind of law it follows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.sweep import paper
from engram.sweep.memory_scaling import Offset, Scaling, fit_scaling, offset
from engram.sweep.paired import Difference, paired_difference
from engram.sweep.views.points import Losses, Points
from engram.sweep.views.words import compared, interval, signed

AXIS = "rows"
# A law needs as many sizes.
_FEWEST = 3
# Of the table of a part; differences and errors in nats per token.
_ROWS = (
    "runs",
    "largest minus no table",
    "ten times the rows",
    "error at left-out points, straight line",
    "error at left-out points, power law",
    "better law",
)


@dataclass(frozen=True)
class Growth:
    """One kind of table, by ascending rows (above 0); `scaling` is None where too few sizes are finished."""

    name: str
    points: Points
    # Of all tables, as counted after they became primes.
    rows: tuple[int, ...]
    scaling: Scaling | None
    # The largest finished size minus the model without tables.
    gain: Difference | None

    @property
    def law(self) -> str:
        """The law to draw first."""
        power = self.scaling is not None and self.scaling.preferred == "power law"
        return "power law" if power else "log-linear"

    def laws(self, rows: Losses) -> dict[str, Losses]:
        """Predictions of both laws."""
        if self.scaling is None:
            return {}
        return {
            "log-linear": self.scaling.log_linear.predict(rows),
            "power law": self.scaling.power_law.predict(rows),
        }

    @property
    def slope(self) -> str:
        """`−0.041 nat per decade of rows (−0.045 to −0.037)`."""
        if self.scaling is None:
            return f"{self.points.count}, {_FEWEST} sizes are needed for a law"
        text, found = f"{signed(-self.scaling.per_decade)} nat per decade", self.scaling.per_decade_interval
        if found is None:
            return f"{text} (one seed)"
        resolved = "" if not found[0] <= 0 <= found[1] else "not resolved: "
        return f"{text} ({resolved}{signed(-found[1])} to {signed(-found[0])})"

    @property
    def says(self) -> str:
        text = self.scaling.says if self.scaling else self.slope
        return f"{text}; the largest is {compared(self.gain, 'the model without tables')}" if self.gain else text


@dataclass(frozen=True)
class ScalingView:
    """What a part with `view: scaling` says."""

    name: str
    points: Points
    curves: tuple[Growth, ...]
    # Losses of the model without tables, by the points' seeds; None where it is not finished.
    baseline: Losses | None
    # Each further kind of table against the first.
    offsets: tuple[tuple[str, Offset], ...]

    @property
    def findings(self) -> list[str]:
        named = [f"{curve.name}: {curve.says}" if curve.name else curve.says for curve in self.curves]
        return [*named, *(self._apart(name, found) for name, found in self.offsets)]

    @property
    def title(self) -> str:
        """The finding in a few lines."""
        return "; ".join(f"{curve.name}: {curve.slope}" if curve.name else curve.slope for curve in self.curves)

    def _apart(self, name: str, found: Offset) -> str:
        text = f"{name} lies {signed(found.loss)} nat from {self.curves[0].name} at {found.at:,.0f} rows"
        if found.loss_interval is None:
            return f"{text} (no interval)"
        low, high = found.loss_interval
        return f"{text} ({'not resolved: ' if low <= 0 <= high else ''}{signed(low)} to {signed(high)})"

    def as_dict(self) -> dict[str, Any]:
        return {
            "view": "scaling",
            "runs": self.points.finished,
            "of": self.points.loss.size,
            "findings": self.findings,
            "curves": [
                {
                    "name": curve.name,
                    "runs": curve.points.finished,
                    "of": curve.points.loss.size,
                    "says": curve.says,
                    "fit": curve.scaling.as_dict() if curve.scaling else None,
                    "largest_from_baseline": curve.gain.as_dict() if curve.gain else None,
                }
                for curve in self.curves
            ],
            "offsets": [{"of": name, "from": self.curves[0].name, **found.as_dict()} for name, found in self.offsets],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A column for each kind of table."""
        columns = [_cells(curve) for curve in self.curves]
        return ["", *(curve.name or "loss" for curve in self.curves)], [
            list(row) for row in zip(_ROWS, *columns, strict=True)
        ]

    def warnings(self) -> list[str]:
        return [
            f"{curve.name}: {note}" if curve.name else note
            for curve in self.curves
            for note in (curve.scaling.warnings if curve.scaling else (curve.slope,))
        ]

    def tiles(self) -> Iterator[tuple[str, str]]:
        for curve in self.curves[:1]:
            if curve.scaling is not None:
                label = "nat for ten times the rows" + (f", {curve.name}" if curve.name else "")
                yield signed(-curve.scaling.per_decade), label


def scaling_view(name: str, points: Points) -> ScalingView:
    """All axes but `rows` tell kinds of tables apart; the points of 0 rows are the model without tables."""
    empty = [index for index, rows in enumerate(points.column("rows")) if rows == 0]
    found = [points.loss[index] for index in empty if np.isfinite(points.loss[index]).any()]
    baseline = found[0] if found else None
    curves = tuple(_growth(label, held, baseline) for label, held in points.split(AXIS).items())
    first = curves[0].scaling if curves else None
    pairs = [(curve.name, curve.scaling) for curve in curves[1:] if curve.scaling]
    offsets = tuple((label, offset(first, scaling)) for label, scaling in pairs) if first else ()
    return ScalingView(name, points, curves, baseline, offsets)


def paper_growth() -> tuple[tuple[Growth, ...], float]:
    """The paper's two curves, fitted as ours are, and the loss of its model without tables."""
    data = paper.memory_scaling()
    curves = []
    for name, (slots, loss) in (("engram", data["engram"]), ("over_encoding", data["over_encoding"])):
        rows = tuple({"rows": int(count)} for count in slots)
        points = Points((), rows, (0,), loss[:, None])
        curves.append(_growth(name, points, np.array([data["baseline"]])))
    return tuple(curves), data["baseline"]


def _growth(name: str, points: Points, baseline: Losses | None) -> Growth:
    rows = points.column("rows")
    points = points.take(sorted((index for index, count in enumerate(rows) if count > 0), key=rows.__getitem__))
    finished = np.flatnonzero(np.isfinite(points.loss).any(axis=1))
    gain = None
    if len(finished) and baseline is not None:
        largest = points.loss[finished[-1]]
        gain = paired_difference(largest, baseline) if np.isfinite(largest - baseline).any() else None
    sizes = points.column("rows")
    enough = len({sizes[index] for index in finished}) >= _FEWEST
    return Growth(name, points, tuple(sizes), fit_scaling(sizes, points.loss) if enough else None, gain)


def _cells(curve: Growth) -> list[str]:
    found, runs = curve.scaling, curve.points.count.removesuffix(" runs")
    gain = interval(curve.gain) if curve.gain else "–"
    if found is None:
        return [runs, gain, *["–"] * (len(_ROWS) - 2)]
    errors = (found.log_linear.left_out, found.power_law.left_out)
    shown = ["–" if error is None else f"{error:.4f}" for error in errors]
    return [runs, gain, curve.slope.replace(" nat per decade", ""), *shown, found.preferred]
