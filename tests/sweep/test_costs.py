"""Costs above a curve's minimum: exact ranges of a known curve, and intervals that move with its draws."""

import numpy as np
import pytest

from engram.sweep.costs import Costs
from engram.sweep.u_curve import TwoTerm

# 1 / (0.5 + rho) + 1 / (0.5 + 1 - rho): even around 0.5, where it is 2.
CURVE = TwoTerm(floor=0.0, experts=1.0, memory=1.0, a=1.0, b=1.0, p0=0.5, m0=0.5, rmse=0.0)
PLACES = np.linspace(0, 1, 401)


def costs(shifts: list[float], coarse_shift: float = 0.0) -> Costs:
    """Draws that are the curve, moved sideways."""
    curves = np.array([CURVE.predict(PLACES - shift) for shift in shifts]).reshape(len(shifts), 401)
    return Costs(CURVE, PLACES, curves, CURVE.predict(PLACES - coarse_shift), 0.9)


def test_the_range_within_a_cost() -> None:
    """2 / (1 - d^2) = 2 + x at a distance of d = sqrt(x / (2 + x))."""
    for nat in (0.005, 0.02):
        d = np.sqrt(nat / (2 + nat))
        found = costs([]).within(nat)
        assert (found.low, found.high) == pytest.approx((0.5 - d, 0.5 + d), abs=1 / 400)
        assert found.nat == nat and found.low_interval is None and found.high_interval is None
    assert (costs([]).within(9.0).low, costs([]).within(9.0).high) == (0, 1)


def test_its_ends_move_with_the_draws() -> None:
    shifts = np.linspace(-0.1, 0.1, 201)
    found = costs(shifts.tolist()).within(0.02)
    assert found.low_interval == pytest.approx((found.low - 0.09, found.low + 0.09), abs=0.005)
    assert found.high_interval == pytest.approx((found.high - 0.09, found.high + 0.09), abs=0.005)
    # The measured range ends at 0 and 1.
    assert costs([-0.45, -0.45, -0.45]).within(0.02).low_interval == (0, 0)


def test_what_the_coarse_grid_misses_is_made_up_for() -> None:
    """All draws and the grid's own curve are off alike: the interval is the fitted curve's point."""
    found = costs([0.1, 0.1, 0.1], coarse_shift=0.1)
    near = found.within(0.01)
    assert near.low_interval == pytest.approx((near.low,) * 2) and near.high_interval == pytest.approx((near.high,) * 2)
    regret = found.at(0.75)
    assert regret.loss == pytest.approx(2 / (1 - 0.25**2) - 2) and regret.interval == pytest.approx((regret.loss,) * 2)


def test_a_regret_by_hand() -> None:
    regret = costs([-0.05, 0.0, 0.05]).at(0.75)
    low, middle, high = (2 / (1 - d**2) - 2 for d in (0.2, 0.25, 0.3))
    assert regret.loss == pytest.approx(middle)
    assert regret.interval == pytest.approx((low + 0.1 * (middle - low), high - 0.1 * (high - middle)))
    assert costs([]).at(1.01) is None and costs([]).at(0.5).loss == pytest.approx(0)
