"""Rows of a table as losses of points and seeds, which is what intervals are made of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.sweep.tables import Row, axis_column

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """`loss[n, s]` of point n and seed s, nats per token; NaN where no run is finished, infinite where it diverged."""

    axes: tuple[str, ...]
    # The first row of each point: what it is and what it counts, which is the same for all seeds.
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    loss: Losses

    @property
    def finished(self) -> int:
        return int(np.isfinite(self.loss).sum())

    @property
    def count(self) -> str:
        """`23 of 27 runs`."""
        return f"{self.finished} of {self.loss.size} runs"

    @property
    def diverged(self) -> tuple[int, ...]:
        """How many runs of each point diverged."""
        return tuple(int(count) for count in np.isinf(self.loss).sum(axis=1))

    def column(self, name: str) -> list[Any]:
        """A fixed column, by point."""
        return [row[name] for row in self.rows]

    def axis(self, name: str) -> list[Any]:
        """Values of an axis, by point."""
        return self.column(axis_column(name))

    def label(self, index: int) -> str:
        """The point's values of all axes, without the axes' names; of a part without axes, its only point."""
        return ", ".join(str(self.rows[index][axis_column(axis)]) for axis in self.axes) or "the only point"

    def find(self, point: Mapping[str, Any]) -> int | None:
        """Index of the first point that has these values, whatever its other axes say."""
        wanted = {axis_column(axis): str(value) for axis, value in point.items()}
        matches = (all(str(row.get(name)) == value for name, value in wanted.items()) for row in self.rows)
        return next((index for index, match in enumerate(matches) if match), None)

    def take(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> "Points":
        """Points and seeds by their positions."""
        chosen = list(range(len(self.seeds)) if seeds is None else seeds)
        return Points(
            self.axes,
            tuple(self.rows[index] for index in indices),
            tuple(self.seeds[index] for index in chosen),
            self.loss[np.ix_(list(indices), chosen)],
        )

    def split(self, along: str) -> dict[str, "Points"]:
        """One curve along the axis `along` for each combination of all other axes, by the others' values."""
        others = [axis for axis in self.axes if axis != along]
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault(", ".join(str(row[axis_column(axis)]) for axis in others), []).append(index)
        return {name: self.take(indices) for name, indices in groups.items()}

    def by_seed(self, index: int, seeds: Sequence[int]) -> Losses:
        """Losses of one point for these seeds, NaN for those that it lacks."""
        held = dict(zip(self.seeds, self.loss[index], strict=True))
        return np.array([held.get(seed, np.nan) for seed in seeds], dtype=float)

    def lowest(self) -> int:
        """Position of the point with the lowest mean over the seeds that most points have; one run is needed.

        Points of which a run diverged come last: those of their seeds that went well are no sample of all.
        """
        steady = [index for index, count in enumerate(self.diverged) if not count]
        whole = self.take(steady)
        complete = (whole if whole.finished else self).complete()
        row = complete.rows[int(np.argmin(complete.loss.mean(axis=1)))]
        return next(index for index, candidate in enumerate(self.rows) if candidate is row)

    def complete(self) -> "Points":
        """The part of the grid in which no run is missing: emptiest points and seeds are left out first."""
        points, seeds = list(range(len(self.rows))), list(range(len(self.seeds)))
        while points and seeds:
            missing = ~np.isfinite(self.loss[np.ix_(points, seeds)])
            if not missing.any():
                break
            by_point, by_seed = missing.mean(axis=1), missing.mean(axis=0)
            if by_point.max() >= by_seed.max():
                points.pop(int(by_point.argmax()))
            else:
                seeds.pop(int(by_seed.argmax()))
        return self.take(points, seeds)


def points(rows: Iterable[Row], part: str, axes: Iterable[str]) -> Points:
    """Points of a part of the study, in the table's order."""
    axes = tuple(axes)
    first: dict[tuple[Any, ...], Row] = {}
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["part"] != part:
            continue
        point = tuple(row.get(axis_column(axis)) for axis in axes)
        first.setdefault(point, row)
        absent = math.inf if row["status"] == "failed" else math.nan
        loss = row["val_loss"]
        found.setdefault(point, {})[row["seed"]] = absent if loss is None else loss
    seeds = tuple(dict.fromkeys(seed for losses in found.values() for seed in losses))
    loss = np.array([[losses.get(seed, np.nan) for seed in seeds] for losses in found.values()], dtype=float)
    return Points(axes, tuple(first.values()), seeds, loss.reshape(len(first), len(seeds)))
