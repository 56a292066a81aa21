"""Which point others are compared with, and the difference from it, paired by seed."""

from collections.abc import Mapping

from engram.sweep.paired import Difference, paired_difference
from engram.sweep.spec import Part, SweepError
from engram.sweep.views.points import Points


def reference_point(part: Part, name: str, index: int, everything: Mapping[str, Points]) -> tuple[Points, int] | None:
    """The points that hold the reference of point `index` of part `name`, and its position there.

    Axes that `part.reference` leaves out keep the point's own values; without a `reference`, the part's first point.
    None where the table has no such point yet. Raises SweepError: the reference names no part, axis or value.
    """
    own = everything[name]
    if part.reference is None:
        return own, 0
    wanted = dict(part.reference)
    place = wanted.pop("part", name)
    if place not in everything:
        raise SweepError(f"part {name}: reference names part {place!r}: the parts are {', '.join(everything)}")
    held = everything[place]
    for axis in wanted:
        if axis not in held.axes:
            raise SweepError(
                f"part {name}: reference names axis {axis!r}, but part {place} has the axes {', '.join(held.axes)}"
            )
    own_values = {axis: own.axis(axis)[index] for axis in own.axes if axis in held.axes}
    found = held.find({**own_values, **wanted})
    if found is None and held.rows:
        shown = ", ".join(f"{axis}={value}" for axis, value in {**own_values, **wanted}.items())
        raise SweepError(f"part {name}: reference {shown}: part {place} has no such point")
    return None if found is None else (held, found)


def is_same(points: Points, index: int, other: Points, other_index: int) -> bool:
    """Whether both are one point, or points of two parts that ask for the same runs."""
    own, theirs = points.rows[index], other.rows[other_index]
    return own is theirs or own["run_id"] == theirs["run_id"]


def difference_from(points: Points, index: int, other: Points, other_index: int) -> Difference | None:
    """Point minus reference over the seeds that both have; None where there are none."""
    return paired_difference(points.loss[index], other.by_seed(other_index, points.seeds))
