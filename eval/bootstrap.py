"""Intervals of means over documents or items, which are drawn anew with replacement: tokens of a document are not.

Legend: N units (documents, items), R draws; `...` numbers measured on each unit, all on the same draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Numbers of one block of drawn counts: 32 MiB.
_BLOCK = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, each float64 [...]; the ends are NaN where one unit tells no spread."""

    mean: Array
    low: Array
    high: Array

    @property
    def resolved(self) -> npt.NDArray[np.bool_]:
        """Where the interval leaves zero out."""
        return (self.low > 0) | (self.high < 0)


def interval(
    values: npt.ArrayLike, weights: npt.ArrayLike | None = None, level: float = 0.9, draws: int = 2000, seed: int = 0
) -> Interval:
    """sum_n values_n / sum_n weights_n, and the percentile bootstrap's interval of it at `level`.

    values [N, ...] are the units' sums and weights [N] or [N, ...] their counts; without weights every unit counts
    once, and this is the plain mean. Equal N and seed draw equal units, so that two models' draws are paired.
    """
    return percentiles(means(values, weights), resampled_means(values, weights, draws, seed), level)


def paired(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of a - b, where unit n of both is the same document or item, of the same weight."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, "paired units have equal shapes"
    return interval(a - b, weights, level, draws, seed)


def means(values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Array:
    """sum_n values_n / sum_n weights_n, float64 [...]; NaN where the weights sum to 0."""
    values, weights = _units(values, weights)
    return _ratio(values.sum(0), weights.sum(0))


def resampled_means(
    values: npt.ArrayLike, weights: npt.ArrayLike | None = None, draws: int = 2000, seed: int = 0
) -> Array:
    """The means of `draws` sets of N units, drawn with replacement, float64 [R, ...]: for numbers made from means.

    NaN where there is one unit, which tells no spread.
    """
    values, weights = _units(values, weights)
    if len(values) < 2:
        return np.full((draws, *values.shape[1:]), np.nan)
    blocks = draw_counts(len(values), draws, seed)
    return np.concatenate([_ratio(np.tensordot(n, values, 1), np.tensordot(n, weights, 1)) for n in blocks])


def draw_counts(units: int, draws: int, seed: int) -> Iterator[Array]:
    """How often each unit stands in each draw, float64 [R, N], by blocks of R that bound the memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // units)
    for start in range(0, draws, rows):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=min(rows, draws - start))
        yield counts.astype(np.float64)


def percentiles(mean: Array, draws: Array, level: float) -> Interval:
    """The interval that holds the middle `level` of draws [R, ...] of `mean` [...]."""
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return Interval(mean, low, high)


def _units(values: npt.ArrayLike, weights: npt.ArrayLike | None) -> tuple[Array, Array]:
    """Both as float64, the weights with as many axes as the values."""
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    assert len(weights) == len(values), "every unit has a weight"
    return values, weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))


def _ratio(total: Array, weight: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / weight)
