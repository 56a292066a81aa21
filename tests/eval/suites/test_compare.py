"""Paired differences: by hand, with a known truth, and what is not resolved."""

import math

import numpy as np
import pytest

from eval.results import Item, Metric, summarise
from eval.suites.compare import compare, overall


def items(values: list[float], metric: str = "acc", group: str = "", first: int = 0) -> list[Item]:
    return [Item("task", f"{first + place}", metric, value, group) for place, value in enumerate(values)]


def test_mcnemar_by_hand() -> None:
    """Nine items gained and one lost: two-sided exact p = 2 (C(10,0) + C(10,1)) / 2^10."""
    ours, theirs = [1.0] * 9 + [0.0] + [1.0] * 20, [0.0] * 9 + [1.0] + [1.0] * 20
    (one,) = compare(items(ours), items(theirs), [])
    assert (one.gained, one.lost, one.n, one.unpaired) == (9, 1, 30, 0)
    assert one.p_value == pytest.approx(2 * 11 / 1024)
    assert one.difference == pytest.approx(8 / 30) and one.low > 0 and one.verdict == "better"


def test_the_bootstrap_alone_does_not_resolve_few_disagreements() -> None:
    """Four items gained, none lost: the interval leaves out zero, McNemar's p is 0.125."""
    (one,) = compare(items([1.0] * 4 + [0.0] * 6), items([0.0] * 10), [])
    assert one.low > 0 and one.p_value == pytest.approx(0.125) and one.verdict == "not resolved"


def test_items_are_paired_by_id_whatever_their_order() -> None:
    """Unpaired, the spread between items would hide the difference."""
    hardness = np.random.normal(0, 10, 50)
    noise = np.random.normal(0, 0.01, 50)
    theirs = items(list(hardness), "margin")
    ours = items(list(hardness + 0.1 + noise), "margin")[::-1]
    (one,) = compare([*ours, Item("task", "only ours", "margin", 99.0)], theirs, [])
    assert one.difference == pytest.approx(0.1, abs=0.01) and one.verdict == "better"
    assert one.unpaired == 1 and math.isnan(one.p_value)
    assert 0.095 < one.low < one.difference < one.high < 0.105


def test_losses_are_better_when_they_fall() -> None:
    ours, theirs = items([1.0, 1.1, 1.2], "loss"), items([1.5, 1.6, 1.7], "loss")
    metrics = [Metric("task", "loss", 1.1, 0.1, 3, higher_is_better=False)]
    assert compare(ours, theirs, metrics)[0].verdict == "better"
    assert compare(theirs, ours, metrics)[0].verdict == "worse"


def test_groups_and_all_of_them_together() -> None:
    """Ids repeat between groups: they are still different items."""
    ours = items([1.0, 1.0], group="a") + items([0.0, 1.0], group="b")
    theirs = items([0.0, 1.0], group="a") + items([0.0, 0.0], group="b")
    found = compare(ours, theirs, summarise(ours))
    assert [(one.group, one.n, one.gained) for one in found] == [("a", 2, 1), ("b", 2, 1), ("", 4, 2)]
    assert [one.group for one in overall(found)] == [""]


def test_nothing_in_common() -> None:
    assert compare(items([1.0]), items([1.0], first=5), []) == []


def test_means_over_tokens_weigh_tokens() -> None:
    """By document the first is worse, by token it is better."""

    def documents(losses: list[float]) -> list[Item]:
        sizes = (1000, 10, 10)
        return [
            Item("t", str(n), "document_loss", x, weight=w) for n, (x, w) in enumerate(zip(losses, sizes, strict=True))
        ]

    ours, theirs = documents([2.0, 4.0, 4.0]), documents([2.5, 3.5, 3.5])
    (one,) = compare(ours, theirs, summarise(ours))
    assert one.value == pytest.approx(2080 / 1020) and one.baseline == pytest.approx(2570 / 1020)
    assert one.difference == pytest.approx((-500 + 5 + 5) / 1020)
    (metric,) = summarise(ours)
    assert metric.value == pytest.approx(2080 / 1020) and not metric.higher_is_better
    # The ratio estimator's error: residuals of sums around the mean.
    residuals = [1000 * (2.0 - metric.value), 10 * (4.0 - metric.value), 10 * (4.0 - metric.value)]
    assert metric.stderr == pytest.approx(math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 1020)


def test_questions_about_one_passage_are_drawn_together() -> None:
    """Ten copies of each of twelve answers: what they are worth is twelve, not 120."""
    values = np.random.default_rng(2).normal(0.3, 1, 12)

    def copies(times: int, shift: float) -> list[Item]:
        return [
            Item("t", f"{unit}-{copy}", "margin", shift * value, unit=f"passage {unit}")
            for unit, value in enumerate(values)
            for copy in range(times)
        ]

    (once,), (often,) = (compare(copies(times, 1.0), copies(times, 0.0), []) for times in (1, 10))
    assert often.n == 120 and (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))
    # Right answers of four passages, gained as a whole, are four units for the exact test.
    gained = [Item("t", f"{unit}-{copy}", "acc", 1.0, unit=str(unit)) for unit in range(4) for copy in range(5)]
    lost = [Item("t", one.id, "acc", 0.0, unit=one.unit) for one in gained]
    (one,) = compare(gained, lost, [])
    assert (one.gained, one.p_value, one.verdict) == (20, pytest.approx(0.125), "not resolved")
