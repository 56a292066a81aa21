"""Numbers of several runs of one recipe: their mean, and the difference of two recipes, with what seeds add in doubt.

    half width = t_df(level) sqrt(s^2 / n + v),  df = (n - 1) (1 + v n / s^2)^2

s^2 is the variance between n runs of one recipe and v that of the mean over draws of documents, which all runs read
alike; df are Satterthwaite's degrees of freedom for the sum of a variance from n runs and a known one. With one run for
each recipe nothing tells s^2: the interval then is of the documents alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from eval.bootstrap import Array, Interval, percentiles


@dataclass(frozen=True)
class Sample:
    """One run's numbers [...], and the same numbers over drawn documents [R, ...], equal draws for all runs."""

    value: Array
    draws: Array


def over_runs(runs: Sequence[Sample], level: float = 0.9) -> Interval:
    """The mean of runs that differ in their seed."""
    return _combined(runs, [], level)


def difference(runs: Sequence[Sample], baseline: Sequence[Sample], level: float = 0.9) -> Interval:
    """Mean of `runs` - mean of `baseline`, on the same documents; the spread between runs is pooled over both."""
    return _combined(runs, baseline, level)


def _combined(runs: Sequence[Sample], baseline: Sequence[Sample], level: float) -> Interval:
    sides = [side for side in (runs, baseline) if side]
    values = [np.stack([run.value for run in side]) for side in sides]
    drawn = [np.mean([run.draws for run in side], axis=0) for side in sides]
    mean, draws = values[0].mean(0), drawn[0]
    if baseline:
        mean, draws = mean - values[1].mean(0), draws - drawn[1]
    freedom = sum(len(side) - 1 for side in sides)
    if freedom == 0:
        return percentiles(mean, draws, level)
    squares = sum(((side - side.mean(0)) ** 2).sum(0) for side in values)
    between, within = squares / freedom * sum(1 / len(side) for side in sides), draws.var(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Runs that agree in full leave the documents' doubt alone, whose distribution is normal.
        degrees = np.where(between > 0, freedom * (1 + within / between) ** 2, np.inf)
    half = student_t.ppf((1 + level) / 2, degrees) * np.sqrt(between + within)
    return Interval(mean, mean - half, mean + half)
