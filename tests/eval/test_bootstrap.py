"""Intervals against a loop over draws, and how often they hold the truth."""

import math

import numpy as np
import pytest

from eval.bootstrap import draw_counts, interval, means, paired, resampled_means


def test_equals_a_loop_over_drawn_units() -> None:
    """Every draw recomputed unit by unit, as a ratio of sums."""
    rng = np.random.default_rng(3)
    values, counts = rng.normal(size=(7, 2)), rng.integers(1, 9, size=7)
    found = resampled_means(values, counts, draws=50, seed=5)
    drawn = np.concatenate(list(draw_counts(7, 50, 5)))
    assert (drawn.sum(1) == 7).all() and drawn.max() > 1
    for draw, result in zip(drawn, found, strict=True):
        units = [unit for unit, times in enumerate(draw) for _ in range(int(times))]
        for column in range(2):
            total = math.fsum(values[unit, column] for unit in units)
            assert result[column] == pytest.approx(total / sum(counts[unit] for unit in units))
    whole = interval(values, counts, level=0.8, draws=50, seed=5)
    np.testing.assert_allclose(whole.mean, values.sum(0) / counts.sum())
    np.testing.assert_allclose(whole.low, np.quantile(found, 0.1, axis=0))
    np.testing.assert_allclose(whole.high, np.quantile(found, 0.9, axis=0))


def test_a_unit_counts_by_its_weight() -> None:
    """A document of a thousand tokens moves the mean as a thousand documents of one."""
    np.testing.assert_allclose(means([1000.0, 0.0], [1000, 1]), 1000 / 1001)
    np.testing.assert_allclose(means([[1.0, 6.0], [3.0, 0.0]], [[1, 2], [1, 1]]), [2.0, 2.0])


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_coverage(level: float) -> None:
    """Means of skewed, unequally long documents: the interval holds the truth about as often as it says."""
    rng = np.random.default_rng(11)
    held = 0
    for trial in range(400):
        counts = rng.integers(5, 40, size=60)
        # Tokens of one document share half of their deviation; each has mean 1.
        values = counts * (0.5 * rng.exponential(size=60) + 0.5 + 0.1 * rng.normal(size=60))
        found = interval(values, counts, level=level, draws=300, seed=trial)
        held += bool(found.low <= 1 <= found.high)
    # 400 trials of a binomial: three standard deviations are 0.06 and less.
    assert level - 0.06 < held / 400 < level + 0.05


def test_paired_units_cancel_what_they_share() -> None:
    """Documents differ by much, models by little: only the pairing resolves the difference."""
    rng = np.random.default_rng(2)
    document = rng.normal(scale=5, size=80)
    a, b = document + 0.1 + 0.1 * rng.normal(size=80), document + 0.1 * rng.normal(size=80)
    difference = paired(a, b)
    assert difference.resolved and difference.mean == pytest.approx((a - b).mean())
    assert interval(a).low < interval(b).high
    # The same seed draws the same documents, so that differences of draws are paired too.
    np.testing.assert_allclose(resampled_means(a) - resampled_means(b), resampled_means(a - b))
    assert not paired(a, a[::-1]).resolved


def test_fixed_seed_and_one_unit() -> None:
    values = np.random.default_rng(4).normal(size=9)
    assert interval(values).low == interval(values).low != interval(values, seed=1).low
    alone = interval([4.0])
    assert alone.mean == 4 and np.isnan(alone.low) and np.isnan(alone.high) and not alone.resolved


def test_blocks_of_draws_join(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resampled_means(np.arange(6.0), draws=11)
    monkeypatch.setattr("eval.bootstrap._BLOCK", 24)
    assert [len(block) for block in draw_counts(6, 11, 0)] == [4, 4, 3]
    np.testing.assert_allclose(resampled_means(np.arange(6.0), draws=11), whole)
