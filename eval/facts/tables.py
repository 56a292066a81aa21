"""Scores of several recipes, each over its runs: with intervals, by exposures, and less the baseline.

Legend: R draws, N questions, K metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import Interval, resampled_means
from eval.facts import crowding
from eval.facts.questions import SETS
from eval.over_runs import Sample, difference, over_runs
from eval.results import Item

METRICS = ("accuracy", "margin", "bits_per_byte", "cloze", "memorised")
# Fewer seeds of either side make a difference one of these runs, not of the recipes.
ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class Run:
    """One checkpoint's answers; `recipe` is the label of all runs that differ in their seeds alone."""

    recipe: str
    folder: str
    seed: int
    step: int
    items: list[Item]


@dataclass(frozen=True)
class Row:
    """One number of one recipe, or (`baseline`) the difference from another's; `group`: exposures, or all questions."""

    recipe: str
    task: str
    metric: str
    group: str
    interval: Interval
    questions: int
    runs: int
    baseline: str = ""
    baseline_runs: int = 0

    @property
    def verdict(self) -> str:
        """What the interval of a difference says, and whether runs of enough seeds say it."""
        if not self.interval.resolved:
            return "not resolved"
        word = "higher" if self.interval.mean > 0 else "lower"
        enough = min(self.runs, self.baseline_runs) >= ENOUGH_SEEDS
        return word if enough else f"{word} in these runs (fewer than {ENOUGH_SEEDS} seeds)"


def recipes(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by their recipe, in order of appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.recipe, []).append(run)
    return found


def score_rows(runs: Sequence[Run], level: float, seed: int) -> list[Row]:
    """Every recipe's metrics on every set, all questions together."""
    return [
        row
        for members in recipes(runs).values()
        for task in _tasks(runs)
        for row in _rows(members, task, "all", level, seed)
    ]


def exposure_rows(runs: Sequence[Run], level: float, seed: int) -> list[Row]:
    """Every recipe's metrics on each group of the sets that have groups: exposures of a fact, lengths, links."""
    found = []
    for members in recipes(runs).values():
        for task in _tasks(runs):
            groups = dict.fromkeys(item.group for item in members[0].items if item.task == task and item.group)
            found += [row for group in groups for row in _rows(members, task, group, level, seed)]
    return found


def difference_rows(runs: Sequence[Run], baseline: Sequence[Run], level: float, seed: int) -> list[Row]:
    """Accuracy and margin of each recipe less those of the baseline's runs, on the same questions."""
    found = []
    for recipe, members in recipes(runs).items():
        for task in _tasks(runs):
            names, counted = _metrics(members[0], task), len(_ids(members[0], task, "all"))
            ours, theirs = ([_sample(run, task, "all", names, seed) for run in side] for side in (members, baseline))
            gained = difference(ours, theirs, level)
            found += [
                Row(
                    recipe,
                    task,
                    name,
                    "all",
                    _at(gained, place),
                    counted,
                    len(members),
                    baseline[0].recipe,
                    len(baseline),
                )
                for place, name in enumerate(names)
                if name in ("accuracy", "margin")
            ]
    return found


def collision_rows(runs: Sequence[Run], level: float, seed: int) -> list[Row]:
    """Of each recipe with memory: accuracy on crowded facts, on facts alone, and the difference of the two."""
    found = []
    for recipe, members in recipes(runs).items():
        if not any(item.task == crowding.TASK for item in members[0].items):
            continue
        sizes = len(_ids(members[0], crowding.TASK, crowding.GROUPS[0]))
        # Different facts: their draws are independent.
        pairs = [
            [
                _sample(run, crowding.TASK, group, ["accuracy"], seed + place)
                for place, group in enumerate(crowding.GROUPS)
            ]
            for run in members
        ]
        contrast = [Sample(full.value - alone.value, full.draws - alone.draws) for full, alone in pairs]
        columns = [*([pair[place] for pair in pairs] for place in range(2)), contrast]
        for group, samples in zip((*crowding.GROUPS, "crowded - alone"), columns, strict=True):
            interval = _at(over_runs(samples, level), 0)
            found.append(Row(recipe, crowding.TASK, "accuracy", group, interval, sizes, len(members)))
    return found


def columns_of(rows: Sequence[Row], chance: float) -> dict[str, list[Any]]:
    """Rows as columns of a CSV; the chance stands beside accuracies that are no difference."""
    names = ("recipe", "baseline", "task", "metric", "group")
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in names}
    for end in ("mean", "low", "high"):
        columns[end] = [_cell(float(getattr(row.interval, end))) for row in rows]
    plain = ("accuracy", "memorised")
    columns["chance"] = [chance if row.metric in plain and not _is_difference(row) else None for row in rows]
    columns["verdict"] = [row.verdict if row.baseline else None for row in rows]
    for name in ("questions", "runs", "baseline_runs"):
        columns[name] = [getattr(row, name) for row in rows]
    return columns


def _is_difference(row: Row) -> bool:
    return bool(row.baseline) or " - " in row.group


def _tasks(runs: Sequence[Run]) -> list[str]:
    asked = {item.task for item in runs[0].items}
    return [task for task in SETS if task in asked]


def _rows(members: Sequence[Run], task: str, group: str, level: float, seed: int) -> list[Row]:
    names, counted = _metrics(members[0], task), len(_ids(members[0], task, group))
    found = over_runs([_sample(run, task, group, names, seed) for run in members], level)
    return [
        Row(members[0].recipe, task, name, group, _at(found, place), counted, len(members))
        for place, name in enumerate(names)
    ]


def _metrics(run: Run, task: str) -> list[str]:
    known = {item.metric for item in run.items if item.task == task}
    return [metric for metric in METRICS if metric in known]


def _ids(run: Run, task: str, group: str) -> list[str]:
    """Of the questions, each once, in an order that is the same for all runs."""
    return sorted({item.id for item in run.items if item.task == task and group in ("all", item.group)})


def _sample(run: Run, task: str, group: str, metrics: Sequence[str], seed: int) -> Sample:
    """The means [K] of the questions' metrics, and those of drawn questions [R, K]."""
    ids = _ids(run, task, group)
    place = {name: index for index, name in enumerate(ids)}, {name: index for index, name in enumerate(metrics)}
    values_NK = np.full((len(ids), len(metrics)), np.nan)
    for item in run.items:
        if item.task == task and item.id in place[0] and item.metric in place[1]:
            values_NK[place[0][item.id], place[1][item.metric]] = item.value
    return Sample(values_NK.mean(0), resampled_means(values_NK, seed=seed))


def _at(found: Interval, place: int) -> Interval:
    return Interval(found.mean[place], found.low[place], found.high[place])


def _cell(number: float) -> float | None:
    return None if np.isnan(number) else number
