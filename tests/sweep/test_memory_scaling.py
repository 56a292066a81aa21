"""Planted laws and the paper's: slopes, which law is preferred, and how far two models lie apart."""

import json

import numpy as np
import pytest

from engram.config_file import UserError
from engram.sweep import paper
from engram.sweep.memory_scaling import fit_scaling, offset

ROWS = np.geomspace(1e3, 1e5, 7)


def test_the_papers_laws() -> None:
    """Engram: 1.9418 - 0.0284 log10, R2 0.994; OverEncoding: 1.9665 - 0.0302 log10, R2 0.971."""
    data = paper.memory_scaling()
    engram, other = fit_scaling(*data["engram"]), fit_scaling(*data["over_encoding"])
    assert (engram.log_linear.c, engram.per_decade) == pytest.approx((1.9418, 0.0284), abs=2e-4)
    assert engram.log_linear.r2 == pytest.approx(0.994, abs=1e-3)
    assert engram.per_doubling == pytest.approx(0.0085, abs=1e-4)
    # Four points were rounded before that fit was made.
    assert (other.log_linear.c, other.per_decade) == pytest.approx((1.9665, 0.0302), abs=5e-4)
    assert other.log_linear.r2 == pytest.approx(0.971, abs=1e-3)
    assert engram.preferred == other.preferred == "not resolved" and engram.per_decade_interval is None
    assert engram.warnings == ("one seed: the slope has no interval",)
    assert "4 sizes of memory" in other.warnings[0] and "1 decades of rows, less than 1.5" in other.warnings[1]


def test_the_papers_offset() -> None:
    """0.011 to 0.014 nats where both were measured: OverEncoding needs about three times the slots."""
    data = paper.memory_scaling()
    found = offset(fit_scaling(*data["engram"]), fit_scaling(*data["over_encoding"]))
    assert found.at == pytest.approx(np.sqrt(1_292_800 * 10_342_400))
    assert 0.011 < found.loss < 0.014 and found.rows_factor == pytest.approx(2.7, abs=0.1)
    assert found.loss_interval is None and found.rows_factor_interval is None and not found.warnings


def test_a_power_law_is_recovered_and_preferred() -> None:
    loss = 3.2 + 0.5 * (ROWS / 1e3) ** -0.6
    found = fit_scaling(ROWS, loss[:, None] + np.random.default_rng(0).normal(0, 1e-4, (7, 3)))
    assert found.preferred == "power law" and "levels off predicts" in found.says
    assert found.power_law.beta == pytest.approx(0.6, abs=0.005)
    assert found.power_law.floor == pytest.approx(3.2, abs=0.001)
    assert found.power_law.predict(ROWS) == pytest.approx(loss, abs=5e-4)
    assert found.power_law.left_out < 0.01 * found.log_linear.left_out


def test_a_straight_line_is_recovered_and_not_beaten() -> None:
    exact = fit_scaling(ROWS, 3.5 - 0.04 * np.log10(ROWS))
    assert exact.preferred == "log-linear"
    assert (exact.log_linear.c, exact.log_linear.b) == pytest.approx((3.5, 0.04))
    assert exact.log_linear.left_out == pytest.approx(0, abs=1e-12)
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(0, 0.001, (7, 3))
        assert fit_scaling(ROWS, 3.5 - 0.04 * np.log10(ROWS)[:, None] + noise, samples=10).preferred != "power law"


def test_left_out_errors_by_hand() -> None:
    """Losses 0, 0, 0, 1 at logs 0 to 3; leaving out each in turn, the lines through the rest miss by these."""
    found = fit_scaling([1.0, 10.0, 100.0, 1000.0], [0.0, 0.0, 0.0, 1.0])
    errors = []
    for index in range(4):
        keep = [place for place in range(4) if place != index]
        line = np.polyfit(keep, np.array([0.0, 0, 0, 1])[keep], 1)
        errors.append(float(index == 3) - np.polyval(line, index))
    assert found.log_linear.left_out == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert found.power_law.left_out is None and found.preferred == "not resolved"


def test_a_loss_that_rises_has_no_power_law() -> None:
    found = fit_scaling(ROWS, 3 + 0.01 * np.log10(ROWS))
    assert found.per_decade == pytest.approx(-0.01) and found.power_law.scale == 0
    assert found.power_law.floor == pytest.approx(3.04)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_slopes_interval_covers_at_its_level(seeds: int) -> None:
    rng, covered = np.random.default_rng(1), []
    rows = np.geomspace(1e3, 1e5, 5)
    for _ in range(100):
        loss = 3.5 - 0.04 * np.log10(rows)[:, None] + rng.normal(0, 0.002, (5, seeds)) + rng.normal(0, 0.05, seeds)
        low, high = fit_scaling(rows, loss, samples=300, seed=int(rng.integers(1 << 30))).per_decade_interval
        covered.append(low <= 0.04 <= high)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.08)


def test_the_offset_is_paired_by_seed() -> None:
    """Seeds that lie 0.5 apart in both models, while the models lie 0.01 apart: 10^(0.01 / 0.04) times the rows."""
    rng = np.random.default_rng(2)
    level = np.array([0.0, 0.5, -0.3])
    first = 3.5 - 0.04 * np.log10(ROWS)[:, None] + level + rng.normal(0, 1e-4, (7, 3))
    second = 3.51 - 0.04 * np.log10(ROWS)[:, None] + level + rng.normal(0, 1e-4, (7, 3))
    found = offset(fit_scaling(ROWS, first), fit_scaling(ROWS, second))
    assert found.loss == pytest.approx(0.01, abs=2e-4) and found.loss_interval[0] > 0.009
    assert found.loss_interval[1] < 0.011
    assert found.rows_factor == pytest.approx(10**0.25, rel=0.01)
    assert found.rows_factor_interval[0] < 10**0.25 < found.rows_factor_interval[1] < 2


def test_an_offset_to_a_law_that_does_not_fall() -> None:
    falls, flat = fit_scaling(ROWS, 3.5 - 0.04 * np.log10(ROWS)), fit_scaling(ROWS, 3.4 + 0.001 * np.log10(ROWS))
    assert offset(falls, flat).rows_factor is None
    apart = offset(falls, fit_scaling(ROWS * 1e4, 3.0 - 0.04 * np.log10(ROWS)))
    assert "share no range" in apart.warnings[0]


def test_a_factor_of_rows_needs_a_slope_that_surely_falls() -> None:
    """With two seeds a few draws have a slope of any kind; with a slope near its noise, too many have."""
    rng = np.random.default_rng(6)
    for slope, known in ((0.1, True), (0.002, False)):
        first = 4 - slope * np.log10(ROWS)[:, None] + rng.normal(0, 0.005, (7, 2))
        second = 4.12 - slope * np.log10(ROWS)[:, None] + rng.normal(0, 0.005, (7, 2))
        laws = fit_scaling(ROWS, first), fit_scaling(ROWS, second)
        assert (laws[1].resampled[:, 1] <= 0).any()
        interval = offset(*laws).rows_factor_interval
        assert (interval is not None) == known
        if interval:
            assert interval[0] < 10**1.2 < interval[1] < 100
        assert laws[0].warnings == ("two seeds: intervals are several times as long as with three",)


def test_missing_runs_and_the_model_without_memory_are_left_out() -> None:
    loss = 3.5 - 0.04 * np.log10(ROWS)[:, None] + np.array([0.1, -0.1, 0.0])
    whole = fit_scaling(ROWS, loss)
    loss[2, 1] = np.nan
    holes = np.vstack([loss[::-1], [[9.0, 9.0, 9.0]], np.full((1, 3), np.nan)])
    found = fit_scaling([*ROWS[::-1], 0, 1e6], np.hstack([holes, np.full((9, 1), np.nan)]))
    assert found.rows == whole.rows and found.seeds == 3
    assert (found.log_linear.c, found.log_linear.b) == pytest.approx((3.5, 0.04))
    assert found.warnings == ("1 of 21 runs are missing",)


def test_says_when_a_slope_is_not_resolved() -> None:
    rng = np.random.default_rng(3)
    found = fit_scaling(ROWS, 3.5 + rng.normal(0, 0.01, (7, 3)))
    assert found.per_decade_interval[0] < 0 < found.per_decade_interval[1]
    assert "not resolved from zero" in found.says


def test_results_are_plain_json() -> None:
    data = paper.memory_scaling()
    engram, other = fit_scaling(*data["engram"]), fit_scaling(*data["over_encoding"])
    for found in (engram, other, offset(engram, other), fit_scaling(ROWS, np.full((7, 2), 3.0))):
        kept = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert "resampled" not in kept
    assert json.loads(json.dumps(engram.as_dict()))["log_linear"]["b"] == engram.per_decade


def test_two_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="2 sizes of memory cannot be fitted"):
        fit_scaling([0, 1e3, 1e4], [3.0, 2.9, 2.8])


def test_models_that_miss_different_seeds_are_not_taken_as_paired() -> None:
    """Seeds that lie 0.3 apart, of which each model misses another: their levels are no distance between models."""
    levels = np.array([0.0, 0.3, -0.3, 0.1])
    first = (4 - 0.05 * np.log10(ROWS))[:, None] + levels
    second = (4 - 0.05 * np.log10(ROWS / 3))[:, None] + levels
    whole = offset(fit_scaling(ROWS, first), fit_scaling(ROWS, second))
    assert whole.loss == pytest.approx(0.05 * np.log10(3)) and whole.loss_interval is not None and not whole.warnings
    first[:, 0], second[:, 3] = np.nan, np.nan
    found = offset(fit_scaling(ROWS, first), fit_scaling(ROWS, second))
    assert found.loss_interval is None and "different seeds" in found.warnings[0]
