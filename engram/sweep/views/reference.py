"""Which point others are compared with, and the differences from it, paired by seed."""

from collections.abc import Mapping

import numpy as np

from engram.sweep.paired import Difference
from engram.sweep.simultaneous import differences
from engram.sweep.spec import Part, SweepError
from engram.sweep.views.points import Losses, Points


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


def differences_from(points: Points, held: Mapping[int, tuple[Points, int]]) -> dict[int, Difference | None]:
    """Points minus their references `held`, by position, with intervals that hold for all of them at once.

    None where no seed has both.
    """
    # A run counts once, however many points and parts ask for it.
    places: dict[str, int] = {}
    losses: list[Losses] = []

    def place(of: Points, at: int) -> int:
        run = of.rows[at]["run_id"]
        if run not in places:
            places[run] = len(losses)
            losses.append(of.by_seed(at, points.seeds))
        return places[run]

    pairs = [(place(points, index), place(*reference)) for index, reference in held.items()]
    return dict(zip(held, differences(np.array(losses), pairs), strict=True))
