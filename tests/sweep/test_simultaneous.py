"""Comparisons with the best of many: how often equal points are told apart, and that real differences still are."""

import numpy as np
import pytest
from scipy.stats import studentized_range

from engram.sweep.paired import additive, paired_difference
from engram.sweep.simultaneous import critical_value, tied_with

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
