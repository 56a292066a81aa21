"""Loss against the rows of n-gram tables: how much more memory buys, and what kind of law it follows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.sweep import paper
from engram.sweep.memory_scaling import Offset, Scaling, fit_scaling, offset
from engram.sweep.paired import Difference, paired_difference
from engram.sweep.spec import Part
from engram.sweep.views.head import NONE, curve_head, divergence, head, lost_runs, named, side_by_side
from engram.sweep.views.points import Losses, Points
from engram.sweep.words import compared, interval, signed

AXIS = "rows"
# A law needs as many sizes.
_FEWEST = 3


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

    def laws(self, rows: Losses) -> dict[str, Losses]:
        """Predictions of both laws."""
        if self.scaling is None:
            return {}
        return {
            "log-linear": self.scaling.log_linear.predict(rows),
            "power law": self.scaling.power_law.predict(rows),
        }

    @property
    def falls(self) -> bool:
        """Whether the seeds say that the slope is not zero."""
        found = self.scaling.per_decade_interval if self.scaling else None
        return found is not None and not found[0] <= 0 <= found[1]

    @property
    def slope(self) -> str:
        """`−0.041 nat per decade of rows (−0.045 to −0.037)`."""
        if self.scaling is None:
            return f"{self.points.count}, {_FEWEST} sizes are needed for a law"
        text, found = f"{signed(-self.scaling.per_decade)} nat per decade", self.scaling.per_decade_interval
        if found is None:
            return f"{text} (one seed)"
        resolved = "" if self.falls else "not resolved: "
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
    # The paper's curves and the loss of its model without tables, where the part asks for them.
    paper: tuple[tuple[Growth, ...], float] | None

    @property
    def findings(self) -> list[str]:
        apart = [self._apart(name, found) for name, found in self.offsets]
        return [*(named(curve.name, curve.says) for curve in self.curves), *apart, *divergence(self.points)]

    @property
    def title(self) -> str:
        """The finding in a few lines."""
        return "; ".join(named(curve.name, curve.slope) for curve in self.curves)

    def _apart(self, name: str, found: Offset) -> str:
        first, side = self.curves[0].name, "above" if found.loss > 0 else "below"
        text = f"at {found.at:,.0f} rows, {name} lies {abs(found.loss):.3f} nat {side} {first}"
        if found.loss_interval is None:
            return f"{text} (no interval)"
        low, high = found.loss_interval
        if low <= 0 <= high:
            return f"{text} (not resolved: {_ends(low, high)})"
        text += f" ({_ends(low, high)})"
        if found.rows_factor is None or found.rows_factor_interval is None:
            return text
        low, high = found.rows_factor_interval
        return f"{text}: it needs {found.rows_factor:.2g} times the rows for the same loss ({low:.2g} to {high:.2g})"

    def as_dict(self) -> dict[str, Any]:
        return {
            **head("scaling", self.points, self.findings),
            "curves": [
                {
                    **curve_head(curve.name, curve.points, curve.says),
                    "fit": curve.scaling.as_dict() if curve.scaling else None,
                    "largest_from_baseline": curve.gain.as_dict() if curve.gain else None,
                }
                for curve in self.curves
            ],
            "offsets": [{"of": name, "from": self.curves[0].name, **found.as_dict()} for name, found in self.offsets],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A column for each kind of table; differences and errors in nats per token."""
        return side_by_side({curve.name: _cells(curve) for curve in self.curves})

    def warnings(self) -> list[str]:
        notes = [(curve.name, curve.scaling.warnings if curve.scaling else (curve.slope,)) for curve in self.curves]
        notes += [(name, found.warnings) for name, found in self.offsets]
        return [*lost_runs(self.points), *(named(name, note) for name, several in notes for note in several)]

    def tiles(self) -> Iterator[tuple[str, str]]:
        for curve in self.curves[:1]:
            found = curve.scaling
            if found is None:
                continue
            after = f", {curve.name}" if curve.name else ""
            if not curve.falls or found.per_decade_interval is None:
                yield "not resolved", f"what ten times the rows change{after}"
            else:
                low, high = found.per_decade_interval
                yield f"{signed(-found.per_decade)} nat", f"for ten times the rows{after} ({_ends(-high, -low)})"
            yield found.preferred, f"law of the loss over rows{after}"


def scaling_view(name: str, part: Part, everything: Mapping[str, Points]) -> ScalingView:
    """All axes but `rows` tell kinds of tables apart; the points of 0 rows are the model without tables."""
    points = everything[name]
    empty = [index for index, rows in enumerate(points.column("rows")) if rows == 0]
    found = [points.loss[index] for index in empty if np.isfinite(points.loss[index]).any()]
    baseline = found[0] if found else None
    curves = tuple(_growth(label, held, baseline) for label, held in points.split(AXIS).items())
    first = curves[0].scaling if curves else None
    pairs = [(curve.name, curve.scaling) for curve in curves[1:] if curve.scaling]
    offsets = tuple((label, offset(first, scaling)) for label, scaling in pairs) if first else ()
    return ScalingView(name, points, curves, baseline, offsets, paper_growth() if part.paper else None)


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
        gain = paired_difference(points.loss[finished[-1]], baseline)
    sizes = points.column("rows")
    enough = len({sizes[index] for index in finished}) >= _FEWEST
    return Growth(name, points, tuple(sizes), fit_scaling(sizes, points.loss) if enough else None, gain)


def _cells(curve: Growth) -> dict[str, str]:
    """By the names of the table's rows."""
    found = curve.scaling
    lost = [f"{rows:,} ({count})" for rows, count in zip(curve.rows, curve.points.diverged, strict=True) if count]
    cells = {
        "runs": curve.points.count.removesuffix(" runs"),
        "diverged at": ", ".join(lost) or "none",
        "largest minus no table": interval(curve.gain) if curve.gain else NONE,
    }
    if found is None:
        return cells
    errors = {"straight line": found.log_linear.left_out, "power law": found.power_law.left_out}
    return {
        **cells,
        "ten times the rows": curve.slope.replace(" nat per decade", ""),
        **{
            f"error at left-out points, {law}": NONE if error is None else f"{error:.4f}"
            for law, error in errors.items()
        },
        "better law": found.preferred,
    }


def _ends(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"
