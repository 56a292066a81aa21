"""Numbers of runs as rows: each run's, each side's over its runs, and the difference of two sides, with intervals.

Legend: R draws, K numbers of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import Interval, percentiles
from eval.over_runs import Sample, difference, over_runs
from eval.sides import Run

# What stands for all runs of a side.
ALL = "all"
# Runs of each side from which on a difference is said of recipes.
SEEDS = 3
IN_THESE_RUNS = "in these runs"


@dataclass(frozen=True)
class Estimate:
    """Intervals [K] of one run (`run` its index), of a side (None), or of a difference (`side` names both)."""

    side: str
    run: int | None
    interval: Interval
    is_difference: bool = False
    # Of a difference: the runs of the side that has fewer.
    runs: int = 0

    @property
    def verdicts(self) -> list[str | None]:
        """Of each number: `yes`, `no`, or where there are too few seeds to speak of recipes `in these runs`."""
        if not self.is_difference:
            return [None] * self.interval.mean.size
        yes = "yes" if self.runs >= SEEDS else IN_THESE_RUNS
        return [yes if resolved else "no" for resolved in self.interval.resolved.ravel().tolist()]


def estimates(runs: Sequence[Run], samples: Sequence[Sample], level: float) -> list[Estimate]:
    """Every run with its documents' interval, then every side over its runs; samples [K] belong to `runs`."""
    found = [
        Estimate(run.side, index, percentiles(sample.value, sample.draws, level))
        for index, (run, sample) in enumerate(zip(runs, samples, strict=True))
    ]
    return found + [Estimate(side, None, over_runs(_of(runs, samples, side), level)) for side in side_names(runs)]


def compared(runs: Sequence[Run], samples: Sequence[Sample], level: float) -> Estimate | None:
    """The first side less the second; None where there is one side."""
    names = side_names(runs)
    if len(names) < 2:
        return None
    first, second = (_of(runs, samples, name) for name in names)
    fewer = min(len(first), len(second))
    return Estimate(f"{names[0]} - {names[1]}", None, difference(first, second, level), True, fewer)


def side_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.side for run in runs))


def side_of(found: Sequence[Estimate], side: str) -> Interval:
    """The interval over a side's runs."""
    return next(one.interval for one in found if one.side == side and one.run is None)


def picked(sample: Sample, index: Any) -> Sample:
    """Some of a sample's numbers, as `index` picks them from its axes behind the draws."""
    places = index if isinstance(index, tuple) else (index,)
    return Sample(sample.value[places], sample.draws[(slice(None), *places)])


def rows(found: Sequence[Estimate], runs: Sequence[Run], keys: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each estimate and number [K], whose `keys` say what it is; a difference tells if it is resolved."""
    table = []
    for one in found:
        run = None if one.run is None else runs[one.run]
        who = {
            "model": one.side,
            "run": ALL if run is None else str(run.folder),
            "seed": None if run is None else run.seed,
        }
        ends = (one.interval.mean, one.interval.low, one.interval.high)
        for key, mean, low, high, verdict in zip(keys, *(end.tolist() for end in ends), one.verdicts, strict=True):
            number = {"mean": _cell(mean), "low": _cell(low), "high": _cell(high)}
            table.append({**who, **key, **number, "resolved": verdict})
    return table


def columns(table: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of equal keys as columns."""
    return {name: [row[name] for row in table] for name in table[0]}


def _of(runs: Sequence[Run], samples: Sequence[Sample], side: str) -> list[Sample]:
    return [sample for run, sample in zip(runs, samples, strict=True) if run.side == side]


def _cell(number: float) -> float | None:
    return None if np.isnan(number) else number


def shown(interval: Interval, index: int, digits: int = 3) -> str:
    """`mean [low, high]` of one number."""
    mean, low, high = (float(np.asarray(end)[index]) for end in (interval.mean, interval.low, interval.high))
    if np.isnan(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
