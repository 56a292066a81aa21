"""RULER's numbers: scores of tasks and groups with intervals over samples, by depth, and the effective length.

Legend: N samples of each task (index n of one task is paired with index n of another only to draw them together), T
tasks of a group, L lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.bootstrap import Interval, interval, paired
from eval.results import Item
from eval.ruler.sample import Sample

# RULER's own bar: the score of Llama-2-7B at 4,096 tokens.
THRESHOLD = 0.856
DEPTH_BINS = 5
# All tasks together.
ALL = "all"


@dataclass(frozen=True)
class Scores:
    """One model's values of a metric by task and length, float64 [N] in the samples' order."""

    metric: str
    groups: dict[str, list[str]]
    lengths: list[int]
    values: dict[tuple[str, int], npt.NDArray[np.float64]]

    def units(self, group: str, length: int) -> npt.NDArray[np.float64]:
        """Mean over the tasks of a group, [N]: every task weighs the same, as in the paper's table."""
        return np.mean([self.values[task, length] for task in self.groups[group]], axis=0)


def collect(items: Sequence[Item], samples: Sequence[Sample], metric: str) -> Scores:
    """`items` of `samples` as arrays."""
    groups: dict[str, list[str]] = {}
    for one in samples:
        own = groups.setdefault(one.group, [])
        if one.task not in own:
            own.append(one.task)
    groups[ALL] = [task for own in groups.values() for task in own]
    found: dict[tuple[str, int], list[float]] = {}
    for item in items:
        if item.metric == metric:
            found.setdefault((item.task, int(item.group)), []).append(item.value)
    values = {key: np.array(each) for key, each in found.items()}
    return Scores(metric, groups, sorted({length for _, length in values}), values)


def score_of(scores: Scores, group: str, length: int, level: float, seed: int) -> Interval:
    return interval(scores.units(group, length), level=level, seed=seed)


def difference(a: Scores, b: Scores, group: str, length: int, level: float, seed: int) -> Interval:
    """a - b on the same samples."""
    return paired(a.units(group, length), b.units(group, length), level=level, seed=seed)


def effective_length(scores: Scores, threshold: float = THRESHOLD) -> int | None:
    """The longest length whose mean over all tasks is above the threshold; None where there is none."""
    passed = [length for length in scores.lengths if scores.units(ALL, length).mean() > threshold]
    return max(passed, default=None)


def by_depth(
    items: Sequence[Item], samples: Sequence[Sample], metric: str
) -> tuple[list[int], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Lengths, mean scores [DEPTH_BINS, L] and counts of samples that have one needle, by the needle's depth; NaN where
    there is none."""
    single = {one.id: one for one in samples if len(one.needle_depths) == 1}
    lengths = sorted({one.max_length for one in single.values()})
    sums, counts = np.zeros((DEPTH_BINS, len(lengths))), np.zeros((DEPTH_BINS, len(lengths)), np.int64)
    for item in items:
        if item.metric == metric and item.id in single:
            one = single[item.id]
            place = min(int(one.needle_depths[0] * DEPTH_BINS), DEPTH_BINS - 1), lengths.index(one.max_length)
            sums[place] += item.value
            counts[place] += 1
    with np.errstate(invalid="ignore"):
        return lengths, sums / counts, counts
