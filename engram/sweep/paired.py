"""Comparisons of runs that share their seeds: the same initial randomness and the same batches in the same order.

A seed that is worse at one point tends to be worse at all of them, so that differences within a seed are far less noisy
than losses are.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A mean over `n` seeds with its interval, None of which there is with one seed; resolved: zero lies outside."""

    mean: float
    low: float | None
    high: float | None
    resolved: bool
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.9) -> Difference | None:
    """mean(a - b) over seeds [s], with the interval of Student's t, which is exact for few seeds and normal noise.

    Seeds that miss either run (NaN, or infinite) are left out; None where no seed has both.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    both = np.isfinite(a) & np.isfinite(b)
    difference = a[both] - b[both]
    n = len(difference)
    if n == 0:
        return None
    mean = float(difference.mean())
    if n == 1:
        return Difference(mean, None, None, False, 1)
    half = float(t_distribution.ppf((1 + level) / 2, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    return Difference(mean, mean - half, mean + half, abs(mean) > half, n)


@dataclass(frozen=True)
class Additive:
    """loss[n, s] = means[n] + levels[s] + noise, by least squares over the finished runs; levels sum to zero."""

    means: Array
    levels: Array
    # How many runs there are beyond what means and levels take.
    freedom: int
    # Standard deviation of the noise, pooled over all points; None without freedom.
    noise: float | None
    # Probability of differences between points as large as these, if there were none (F test); None without freedom.
    p_value: float | None
    # The losses, where a missing run has its expected value.
    filled: Array


def additive(loss: Array) -> Additive:
    """Every point and every seed needs one finished run."""
    points, seeds = loss.shape
    point, seed = np.nonzero(np.isfinite(loss))
    y = loss[point, seed]
    by_point, by_seed = np.eye(points)[point], np.eye(seeds)[seed]
    solution, full, rank = _least_squares(np.hstack([by_point, by_seed]), y)
    _, without, seed_rank = _least_squares(by_seed, y)
    means, levels = solution[:points], solution[points:]
    means, levels = means + levels.mean(), levels - levels.mean()
    filled = np.where(np.isfinite(loss), loss, means[:, None] + levels)
    freedom, compared = len(y) - rank, rank - seed_rank
    if freedom == 0:
        return Additive(means, levels, 0, None, None, filled)
    noise = float(np.sqrt(full / freedom))
    # Below this, squares are what rounding leaves of equal losses.
    rounding = (4 * np.finfo(float).eps) ** 2 * float(np.sum(y**2))
    if compared == 0 or without - full <= rounding:
        return Additive(means, levels, freedom, noise, 1.0, filled)
    ratio = ((without - full) / compared) / (max(full, rounding) / freedom)
    return Additive(means, levels, freedom, noise, float(f_distribution.sf(ratio, compared, freedom)), filled)


def resampled_means(found: Additive, samples: int, seed: int) -> Array:
    """What the means over seeds may truly be, given how seeds differ: [samples, n], none without freedom.

    A bootstrap over seeds with weights that are normal instead of whole numbers, one draw of weights for all points,
    so that what a seed does to several points stays together. Deviations are inflated by sqrt(s / (s - 1)), by which
    few seeds spread too little, and to the tails of Student's t: for anything linear in the losses these are exact,
    where drawing three seeds with replacement covers 70 % instead of 90 %.
    """
    points, seeds = found.filled.shape
    if found.freedom == 0:
        return np.empty((0, points))
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(samples, seeds)) / np.sqrt(seeds * (seeds - 1))
    weights /= np.sqrt(rng.chisquare(seeds - 1, size=(samples, 1)) / (seeds - 1))
    residual = found.filled - found.means[:, None] - found.levels
    # Runs that are missing stand there without noise: the others make up for it.
    residual *= np.sqrt((points - 1) * (seeds - 1) / found.freedom)
    return found.means + weights @ (found.levels + residual).T


def central_interval(values: Array, level: float) -> Interval | None:
    """What holds the share `level` of `values` [k] and leaves as many below as above; None without values."""
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _least_squares(design: Array, y: Array) -> tuple[Array, float, int]:
    """Solution, sum of squared residuals, rank."""
    found = np.linalg.lstsq(design, y, rcond=None)
    solution = np.asarray(found[0], dtype=np.float64)
    return solution, float(np.sum((y - design @ solution) ** 2)), int(found[2])
