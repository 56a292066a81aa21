"""Comparisons of many points: how often equal ones are told apart, and that real differences still are."""

import numpy as np
import pytest
from scipy.stats import studentized_range

from engram.sweep.paired import additive, paired_difference
from engram.sweep.simultaneous import critical_value, differences, tied_with

ALL = tuple(range(10))


def runs(means: object = 0.0, *, points: int = 10, seeds: int = 3, noise: float = 1.0) -> np.ndarray:
    """`means` beside levels of seeds that are five times as large as the noise."""
    loss = np.random.normal(0, noise, (points, seeds)) + np.random.normal(0, 5 * noise, seeds)
    return loss + np.broadcast_to(np.asarray(means, dtype=float), points)[:, None]


def others(best: int, points: int = 10) -> tuple[int, ...]:
    return tuple(index for index in range(points) if index != best)


@pytest.mark.parametrize(("points", "seeds"), [(4, 2), (10, 3)])
def test_without_holes_it_is_tukeys_range(points: int, seeds: int) -> None:
    freedom = (points - 1) * (seeds - 1)
    found = critical_value(np.ones((points, seeds), dtype=bool), freedom, 0.9)
    assert found == pytest.approx(studentized_range.ppf(0.9, points, freedom) / np.sqrt(2), rel=0.02)


def test_equal_points_are_told_apart_as_often_as_the_level_allows() -> None:
    """Any of ten, of three seeds each: 10 %. A t for each point alone takes one of them for worse in most cases."""
    wrong, alone = [], []
    for _ in range(150):
        loss = runs()
        best = int(loss.mean(axis=1).argmin())
        wrong.append(tied_with(loss, best) != others(best))
        alone.append(any(paired_difference(loss[index], loss[best]).resolved for index in others(best)))
    assert 0.05 < np.mean(wrong) < 0.15 and np.mean(alone) > 0.5


def test_missing_and_diverged_runs_keep_the_level() -> None:
    wrong = []
    for _ in range(150):
        loss = runs(points=6)
        loss[0, :2], loss[3, 1], loss[4, 2] = np.nan, np.inf, np.nan
        best = int(additive(loss).means.argmin())
        wrong.append(tied_with(loss, best) != others(best, 6))
    assert 0.04 < np.mean(wrong) < 0.18


def test_differences_of_the_studys_size_stay_resolved() -> None:
    """Its curve of ten ratios, its noise of a run: what lies 0.025 above the lowest, and more, is told apart."""
    above = np.array([0, 0.007, 0.006, 0.016, 0.026, 0.027, 0.058, 0.071, 0.094, 0.282])
    found = [tied_with(runs(above, noise=0.0072), 0) for _ in range(60)]
    share = [np.mean([index not in tied for tied in found]) for index in ALL]
    assert min(share[6:]) == 1 and min(share[4:6]) > 0.7 and max(share[1:3]) < 0.2


def test_noise_is_pooled_over_all_points() -> None:
    """Two points whose seeds agree by chance, 0.001 apart, among others that scatter by 0.02."""
    loss = np.array([[3.0, 3.1, 2.9], [3.001, 3.101, 2.901], [3.05, 3.1, 2.93], [2.99, 3.14, 2.94], [4.0, 4.1, 3.9]])
    assert paired_difference(loss[1], loss[0]).resolved
    assert tied_with(loss, 0) == (1, 2, 3)


def test_nothing_is_resolved_where_nothing_is_known() -> None:
    assert tied_with(np.array([[1.0], [2.0], [3.0]]), 0) == (1, 2)
    # Points 0 and 1 share seeds with each other only, and so do 2 and 3.
    loss = np.array([[1.0, 1.1, np.nan, np.nan], [2.0, 2.1001, np.nan, np.nan]])
    loss = np.vstack([loss, loss[:, ::-1] + [[4.0], [7.0]]])
    assert tied_with(loss, 0) == (2, 3)
    # A point without any run is no point.
    assert tied_with(np.vstack([loss[:2, :2], [[np.nan, np.inf]]]), 0) == ()


def from_first(points: int) -> list[tuple[int, int]]:
    return [(index, 0) for index in range(1, points)]


@pytest.mark.parametrize(("points", "seeds", "expected"), [(3, 11, 2.38), (5, 6, 2.65), (6, 5, 2.73)])
def test_differences_from_one_reference_are_dunnetts(points: int, seeds: int, expected: float) -> None:
    """His table, two-sided at 95 %, for 20 degrees of freedom; a pair whose own seeds agree well has no more."""
    loss = runs(points=points, seeds=seeds)
    unit = additive(loss).noise * np.sqrt(2 / seeds)
    halves = [(found.high - found.low) / 2 / unit for found in differences(loss, from_first(points), level=0.95)]
    assert min(halves) == pytest.approx(expected, rel=0.03)


def test_a_single_difference_is_students() -> None:
    loss = runs(points=2)
    (found,), alone = differences(loss, [(1, 0)]), paired_difference(loss[1], loss[0])
    assert (found.mean, found.n, found.resolved) == (alone.mean, 3, alone.resolved)
    assert found.high - found.mean == pytest.approx(alone.high - alone.mean, rel=0.03)
    assert found.high >= alone.high and found.mean - found.low == pytest.approx(found.high - found.mean)


def test_no_equal_point_is_taken_for_another_as_often_as_the_level_says() -> None:
    """Of seven changes that change nothing, each on its own, one passes as resolved in nearly half of all studies."""
    together, alone = [], []
    for _ in range(150):
        loss = runs(points=8)
        together.append(any(found.resolved for found in differences(loss, from_first(8))))
        alone.append(any(paired_difference(row, loss[0]).resolved for row in loss[1:]))
    assert np.mean(together) < 0.15 and np.mean(alone) > 0.3


def test_the_lowest_of_many_may_be_picked() -> None:
    """Of ten equal points, the lowest minus the last: on its own it passes as a gain too often."""
    together, alone = [], []
    for _ in range(150):
        loss = runs()
        best = int(loss[:9].mean(axis=1).argmin())
        together.append(differences(loss, [(index, 9) for index in range(9)])[best].resolved)
        alone.append(paired_difference(loss[best], loss[9]).resolved)
    assert np.mean(together) < 0.12 and np.mean(alone) > 0.12


def test_a_noisy_reference_does_not_hide_behind_the_others() -> None:
    """Pooled over all, its noise would be too small: three of ten intervals would miss."""
    covered = []
    for _ in range(100):
        loss = runs(points=8)
        loss[0] += np.random.normal(0, 6, 3)
        covered += [found.low <= 0 <= found.high for found in differences(loss, from_first(8))]
    assert np.mean(covered) > 0.88


def test_differences_around_missing_runs() -> None:
    """Means are over the seeds that both have; what one seed says has no interval, whatever is known of the noise."""
    loss = runs(points=6)
    loss[1, 0], loss[2, :2], loss[3] = np.inf, np.nan, np.nan
    two, one, none, *whole = differences(loss, from_first(6))
    assert two.n == 2 and two.mean == pytest.approx(np.mean(loss[1, 1:] - loss[0, 1:]))
    assert (one.n, one.low, one.resolved) == (1, None, False) and none is None
    assert [found.n for found in whole] == [3, 3]
    assert two.high - two.low > min(found.high - found.low for found in whole)
    # Without a second seed anywhere there is no noise to tell differences from.
    assert [found.low for found in differences(loss[4:, :1], [(1, 0)])] == [None]
