"""Which points are no worse than the best of many: comparisons that hold all at once.

The lowest of n equal points lies below the others by luck, and the further below the more there are. A difference from
it counts if it is larger than the largest one that n equal points would show, at the level of all of them together
(Tukey 1953; Hsu 1996, multiple comparisons with the best). Noise is that of `paired.additive`: pooled over all points,
beside what a seed does to all of them.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from engram.sweep.paired import additive

Array = NDArray[np.float64]

_DRAWS = 10_000


def tied_with(loss: Array, best: int, level: float = 0.9) -> tuple[int, ...]:
    """Positions of the points of `loss` [n, s] that are not resolved from `best`, the lowest of them.

    A run that is not finished is NaN or infinite; points without any are left out. Where nothing is left to estimate
    the noise from, and between points that no chain of common seeds joins, nothing is resolved.
    """
    finite = np.isfinite(loss)
    points, seeds = np.flatnonzero(finite.any(axis=1)), np.flatnonzero(finite.any(axis=0))
    found = additive(loss[np.ix_(points, seeds)])
    others = points[points != best]
    if found.noise is None:
        return tuple(int(index) for index in others)
    errors = _standard_errors(finite[np.ix_(points, seeds)])
    at = int(np.flatnonzero(points == best)[0])
    reach = critical_value(finite[np.ix_(points, seeds)], found.freedom, level) * found.noise * errors[at]
    resolved = np.abs(found.means - found.means[at]) > reach
    return tuple(int(index) for index in points[~resolved] if index != best)


def critical_value(finite: NDArray[np.bool_], freedom: int, level: float) -> float:
    """Largest t of any point against the lowest which equal points, of the runs `finite` [n, s], stay under at `level`.

    Drawn from their joint t distribution. Where no run is missing it is the studentised range over sqrt(2).
    """
    rng = np.random.default_rng(0)
    covariance, errors = _covariance(finite), _standard_errors(finite)
    values, vectors = np.linalg.eigh(covariance)
    means = rng.normal(size=(_DRAWS, len(covariance))) @ (vectors * np.sqrt(np.maximum(values, 0))).T
    lowest = np.argmin(means, axis=1)
    gaps = means - means[np.arange(_DRAWS), lowest][:, None]
    largest = np.max(gaps / errors[lowest], axis=1)
    return float(np.quantile(largest / np.sqrt(rng.chisquare(freedom, _DRAWS) / freedom), level))


def _standard_errors(finite: NDArray[np.bool_]) -> Array:
    """Of the difference of each pair of points [n, n], for noise of 1; infinite where it cannot be known."""
    covariance = _covariance(finite)
    variance = np.diag(covariance)
    errors = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0))
    _, group = connected_components(_normal_matrix(finite))
    apart = group[: len(finite), None] != group[: len(finite)]
    return np.asarray(np.where(apart | np.eye(len(finite), dtype=bool), np.inf, errors))


def _covariance(finite: NDArray[np.bool_]) -> Array:
    """Of the least-squares means [n, n], up to what is common to all of them."""
    count = len(finite)
    return np.asarray(np.linalg.pinv(_normal_matrix(finite))[:count, :count])


def _normal_matrix(finite: NDArray[np.bool_]) -> Array:
    """Of the design whose columns are points and then seeds."""
    point, seed = np.nonzero(finite)
    design = np.hstack([np.eye(finite.shape[0])[point], np.eye(finite.shape[1])[seed]])
    return np.asarray(design.T @ design)
