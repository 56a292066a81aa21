"""Intervals over seeds against the textbook, and how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from eval.over_runs import Sample, difference, over_runs


def exact(value: float) -> Sample:
    """A run whose documents leave no doubt."""
    return Sample(np.array(value), np.full(10, value))


def test_without_documents_doubt_it_is_students_test() -> None:
    """The pooled two-sample interval of scipy, also for unequal numbers of runs."""
    a, b = [1.0, 1.3, 1.1], [0.8, 0.9]
    found = difference([exact(x) for x in a], [exact(x) for x in b], level=0.95)
    expected = ttest_ind(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    alone = over_runs([exact(x) for x in a], level=0.8)
    # Mean 3.4 / 3, deviation 0.152753; Student's t with 2 degrees at 0.9 is 1.885618.
    assert alone.high - alone.mean == pytest.approx(1.885618 * 0.152753 / 3**0.5, rel=1e-5)


def test_one_run_each_is_the_documents_interval() -> None:
    rng = np.random.default_rng(0)
    draws_a, draws_b = rng.normal(2, 1, size=(500, 3)), rng.normal(size=(500, 3))
    a, b = Sample(np.full(3, 2.0), draws_a), Sample(np.zeros(3), draws_b)
    found = difference([a], [b])
    np.testing.assert_allclose(found.mean, 2)
    np.testing.assert_allclose(found.low, np.quantile(draws_a - draws_b, 0.05, axis=0))
    np.testing.assert_allclose(over_runs([b]).high, np.quantile(draws_b, 0.95, axis=0))


def test_documents_doubt_remains_where_runs_agree() -> None:
    """Equal runs do not make an interval of no width: they read the same documents."""
    draws = np.random.default_rng(1).normal(scale=0.5, size=4000)
    found = over_runs([Sample(np.array(0.0), draws)] * 3)
    assert found.high - found.low == pytest.approx(2 * 1.644854 * 0.5, rel=0.05)
    # What both sides owe to the documents cancels.
    assert difference([Sample(np.array(1.0), draws + 1)] * 2, [Sample(np.array(0.0), draws)] * 2).low > 0.99


def test_coverage_over_seeds_and_documents() -> None:
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(500):
        shared = rng.normal(scale=0.3)
        noise = rng.normal(scale=0.3, size=200)
        runs = [1 + shared + rng.normal(scale=0.5) for _ in range(3)]
        found = over_runs([Sample(np.array(value), value + noise) for value in runs])
        held += bool(found.low <= 1 <= found.high)
    # 500 trials of a binomial: three standard deviations are 0.04.
    assert 0.86 < held / 500 < 0.95
