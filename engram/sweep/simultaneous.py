"""Many comparisons that hold all at once: of points with a reference, and of points with the best of them.

Of n points that are equal, some lie apart by luck, and the further apart the more there are. A difference counts if it
is larger than the largest one that equal points would show, at the level of all of them together: among differences
from one reference (Dunnett 1955), and from the lowest point, which nobody named beforehand (Tukey 1953; Hsu 1996,
multiple comparisons with the best). Noise is that of `paired.additive`: pooled over all points, beside what a seed does
to all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from engram.sweep.paired import Additive, Difference, additive, paired_difference

Array = NDArray[np.float64]

_DRAWS = 10_000


def differences(loss: Array, pairs: Sequence[tuple[int, int]], level: float = 0.9) -> list[Difference | None]:
    """mean(first - second) for each of `pairs`, positions in `loss` [n, s], over the seeds that both have.

    Intervals hold for all pairs at once, whichever of them is picked afterwards. The reference's runs, or some point's,
    may be noisier than others: a pair whose own seeds scatter by more than the pooled noise keeps its own interval
    (`paired_difference`) where that is the longer one. A run that is not finished is NaN or infinite; None where no
    seed has both, and no interval where one seed has.
    """
    alone = [paired_difference(loss[first], loss[second], level) for first, second in pairs]
    if not any(found and found.n > 1 for found in alone):
        return alone
    finite = np.isfinite(loss)
    weights = np.zeros((len(pairs), *loss.shape))
    for weight, (first, second) in zip(weights, pairs, strict=True):
        both = finite[first] & finite[second]
        share = both / max(both.sum(), 1)
        weight[first], weight[second] = share, -share
    weights = weights.reshape(len(pairs), -1)
    fitted = _fitted(loss)
    assert fitted.noise is not None
    reach = fitted.noise * _largest_t(weights @ weights.T, fitted.freedom, level)
    return [found and _widened(found, reach * math.sqrt(2 / found.n)) for found in alone]


def tied_with(loss: Array, best: int, level: float = 0.9) -> tuple[int, ...]:
    """Positions of the points of `loss` [n, s] that are not resolved from `best`, the lowest of them.

    A run that is not finished is NaN or infinite; points without any are left out. Where nothing is left to estimate
    the noise from, and between points that no chain of common seeds joins, nothing is resolved.
    """
    finite = np.isfinite(loss)
    points, seeds = np.flatnonzero(finite.any(axis=1)), np.flatnonzero(finite.any(axis=0))
    found = _fitted(loss)
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
    means, errors = _normal(_covariance(finite), rng), _standard_errors(finite)
    lowest = np.argmin(means, axis=1)
    gaps = means - means[np.arange(_DRAWS), lowest][:, None]
    largest = np.max(gaps / errors[lowest], axis=1)
    return float(np.quantile(largest / np.sqrt(rng.chisquare(freedom, _DRAWS) / freedom), level))


def _largest_t(covariance: Array, freedom: int, level: float) -> float:
    """What the largest of several t, whose numerators have this covariance [m, m], stays under at `level`."""
    rng = np.random.default_rng(0)
    errors = np.sqrt(np.diag(covariance))
    largest = np.max(np.abs(_normal(covariance, rng)[:, errors > 0]) / errors[errors > 0], axis=1)
    return float(np.quantile(largest / np.sqrt(rng.chisquare(freedom, _DRAWS) / freedom), level))


def _normal(covariance: Array, rng: np.random.Generator) -> Array:
    """Draws [k, m] of m normal numbers with this covariance [m, m], which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(rng.normal(size=(_DRAWS, len(values))) @ (vectors * np.sqrt(np.maximum(values, 0))).T)


def _fitted(loss: Array) -> Additive:
    """Of the points and seeds that have a finished run."""
    finite = np.isfinite(loss)
    return additive(loss[np.ix_(finite.any(axis=1), finite.any(axis=0))])


def _widened(found: Difference, half: float) -> Difference:
    if found.low is None or found.high is None:
        return found
    half = max(half, found.high - found.mean)
    return replace(found, low=found.mean - half, high=found.mean + half, resolved=abs(found.mean) > half)


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
