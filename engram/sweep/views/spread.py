"""Means over seeds, with intervals that are made for comparing points with each other.

Runs of one seed see the same batches, so that a seed which is worse at one point is worse at all of them. That common
level is taken away before the spread is measured (Cousineau 2005, with Morey's correction). Each interval is its own
point's, so that a noisy point shows; which points differ is said by `simultaneous`, for all of them at once.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from engram.sweep.paired import additive
from engram.sweep.views.points import Losses

LEVEL = 0.9


@dataclass(frozen=True)
class Spread:
    """`losses[n, s]` without their seeds' levels, their `mean[n]`, and the `half[n]` width of its interval.

    NaN where a run is missing; `half` is NaN for points of fewer than two seeds.
    """

    losses: Losses
    mean: Losses
    half: Losses


def spread(loss: Losses, level: float = LEVEL) -> Spread:
    """Of `loss[n, s]`: the least-squares levels of seeds are taken away, which sum to zero."""
    finite = np.isfinite(loss)
    shifted = np.where(finite, loss - seed_levels(loss), np.nan)
    count = finite.sum(axis=1)
    total = np.where(finite, shifted, 0).sum(axis=1)
    mean = np.divide(total, count, out=np.full(len(loss), np.nan), where=count > 0)
    squares = np.where(finite, (shifted - mean[:, None]) ** 2, 0).sum(axis=1)
    points = int((count > 1).sum())
    # Of n points whose common level is gone, one n-th of the spread is gone as well.
    correction = points / (points - 1) if points > 1 else 1.0
    half = np.full(len(loss), np.nan)
    for index in np.flatnonzero(count > 1):
        n = count[index]
        half[index] = t.ppf((1 + level) / 2, n - 1) * np.sqrt(correction * squares[index] / (n - 1) / n)
    return Spread(shifted, mean, half)


def seed_levels(loss: Losses) -> Losses:
    """How much higher each seed lies at all points than the seeds do on average; NaN for a seed without runs."""
    levels = np.full(loss.shape[1], np.nan)
    finite = np.isfinite(loss)
    points, seeds = np.flatnonzero(finite.any(axis=1)), np.flatnonzero(finite.any(axis=0))
    if len(points):
        levels[seeds] = additive(loss[np.ix_(points, seeds)]).levels
    return levels
