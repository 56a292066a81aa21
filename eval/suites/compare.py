"""Two models on the same items: differences by item, never two independent standard errors.

Right or wrong answers: McNemar's exact test on the items where the models disagree. Every metric: the paired
bootstrap's interval of the difference over items.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest

from eval.bootstrap import interval
from eval.results import Item, Metric, by_unit


@dataclass(frozen=True)
class Difference:
    """`value` minus `baseline` over the `n` items that both have; `verdict`: better, worse or not resolved.

    `low` and `high`: the interval of the difference. `gained` and `lost`: items that the model has right and the
    baseline wrong, and the other way round; `p_value` of McNemar's test, NaN where answers are not right or wrong.
    """

    task: str
    metric: str
    group: str
    value: float
    baseline: float
    difference: float
    low: float
    high: float
    n: int
    unpaired: int
    gained: int
    lost: int
    p_value: float
    verdict: str


def compare(
    items: Iterable[Item], baseline: Iterable[Item], metrics: Iterable[Metric], level: float = 0.95, seed: int = 0
) -> list[Difference]:
    """One line for each task, metric and group that both have, in the order of `items`; `metrics` say what is better.

    Where a task has groups, a line with the group "" is over the items of all.
    """
    ours, theirs = _by_metric(items), _by_metric(baseline)
    rises = {(metric.task, metric.metric): metric.higher_is_better for metric in metrics}
    return [
        _difference(key, found, theirs[key], rises.get(key[:2], True), level, seed)
        for key, found in ours.items()
        if key in theirs and found.keys() & theirs[key].keys()
    ]


def _difference(
    key: tuple[str, str, str], ours: dict[str, Item], theirs: dict[str, Item], rises: bool, level: float, seed: int
) -> Difference:
    shared = [identity for identity in ours if identity in theirs]
    a, b = np.array([ours[one].value for one in shared]), np.array([theirs[one].value for one in shared])
    # Both models answered the same items: weights and units are one model's.
    both = [replace(ours[one], value=difference) for one, difference in zip(shared, (a - b).tolist(), strict=True)]
    changes, weights = by_unit(both)
    found = interval(changes, weights, level=level, seed=seed)
    low, high = float(found.low), float(found.high)
    gained, lost, p_value = 0, 0, math.nan
    if np.isin(np.concatenate((a, b)), (0.0, 1.0)).all():
        gained, lost = int((a > b).sum()), int((a < b).sum())
        p_value = _sign_test(changes)
    weight_N = np.array([one.weight for one in both])
    return Difference(
        *key,
        value=float(np.average(a, weights=weight_N)),
        baseline=float(np.average(b, weights=weight_N)),
        difference=float(found.mean),
        low=low,
        high=high,
        n=len(shared),
        unpaired=len(ours.keys() ^ theirs.keys()),
        gained=gained,
        lost=lost,
        p_value=p_value,
        verdict=_verdict(low, high, p_value, rises, level),
    )


def _sign_test(changes: Sequence[float]) -> float:
    """McNemar's exact test, of units: where several items make one, what they gain in sum counts."""
    gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _verdict(low: float, high: float, p_value: float, rises: bool, level: float) -> str:
    # With few items that differ, the bootstrap's interval is too narrow and the exact test is not.
    unsure = not math.isnan(p_value) and p_value > 1 - level
    if unsure or not (low > 0 or high < 0):
        return "not resolved"
    return "better" if (low > 0) == rises else "worse"


def _by_metric(items: Iterable[Item]) -> dict[tuple[str, str, str], dict[str, Item]]:
    """Items by id, of each group, and of all groups of a task together where there are several."""
    found: dict[tuple[str, str, str], dict[str, Item]] = {}
    for item in items:
        found.setdefault((item.task, item.metric, item.group), {})[item.id] = item
    groups: dict[tuple[str, str], list[str]] = {}
    for task, metric, group in found:
        groups.setdefault((task, metric), []).append(group)
    whole: dict[tuple[str, str, str], dict[str, Item]] = {}
    for (task, metric), names in groups.items():
        if len(names) > 1:
            whole[task, metric, ""] = {
                f"{name}/{identity}": item for name in names for identity, item in found[task, metric, name].items()
            }
    return found | whole


def overall(differences: Sequence[Difference]) -> list[Difference]:
    """Without the groups of what also has a line over all of them."""
    whole = {(one.task, one.metric) for one in differences if one.group == ""}
    return [one for one in differences if one.group == "" or (one.task, one.metric) not in whole]


def as_columns(differences: Sequence[Difference]) -> dict[str, list[object]]:
    """The lines as a table's columns."""
    names = list(Difference.__dataclass_fields__)
    return {name: [getattr(one, name) for one in differences] for name in names}
