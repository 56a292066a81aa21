"""Verdicts on planted curves with planted noise: what is said, how often it is wrong, what intervals cover."""

import json

import numpy as np
import pytest
from scipy.stats import f as f_distribution

from engram.config_file import UserError
from engram.sweep import paper
from engram.sweep.judge import Allocation, judge
from engram.sweep.move import compare
from engram.sweep.simultaneous import differences
from engram.sweep.u_curve import Array

RHO = np.array([0.11, 0.21, 0.36, 0.5, 0.61, 0.75, 0.86, 0.93, 1.0])


def curve(rho: Array, argmin: float = 0.79, depth: float = 0.05) -> Array:
    """A sum of two powers, 3.3 at its minimum, `depth` higher at 1."""
    ratio = 0.6 * (0.1 + argmin) ** -1.6 / (0.8 * (1.1 - argmin) ** -1.8)
    at = np.append(rho, [argmin, 1.0])
    shape = (0.1 + at) ** -0.6 + ratio * (1.1 - at) ** -0.8
    return np.asarray(3.3 + depth * (shape[:-2] - shape[-2]) / (shape[-1] - shape[-2]))


def noisy(loss: Array, sd: float, seeds: int, draw: int, rho: Array = RHO, samples: int = 200) -> Allocation:
    """`loss` with noise beside levels of seeds that are five times as large."""
    rng = np.random.default_rng(draw)
    noise = rng.normal(0, sd, (len(loss), seeds)) + rng.normal(0, 5 * sd, seeds)
    return judge(rho, loss[:, None] + noise, samples=samples, seed=draw)


def test_a_clear_minimum() -> None:
    found = noisy(curve(RHO), 0.001, seeds=3, draw=0, samples=2000)
    assert found.verdict == "interior minimum" and found.says.startswith("interior minimum at rho = 0.7")
    assert found.argmin == pytest.approx(0.79, abs=0.015)
    low, high = found.argmin_interval
    assert low < 0.79 < high and high - low < 0.06
    assert found.loss_at_minimum == pytest.approx(3.3, abs=0.01)
    assert found.seed_sd == pytest.approx(0.001, rel=0.3) and found.p_value < 1e-6
    higher_end = curve(RHO)[[0, -1]].max()
    assert found.depth == pytest.approx(higher_end - 3.3, abs=0.003)
    assert found.best == 0.75 and set(found.tied) <= {0.61, 0.86}
    assert found.at_ends == (0, 0) and found.warnings == ()


def test_costs_of_other_choices() -> None:
    """Without noise, costs are the planted curve's own."""
    found = judge(RHO, curve(RHO)[:, None] + np.array([0.0, 0.1, -0.2]))
    exact = curve(np.array([1.0, 0.8, found.parabola.argmin(0.11, 1)])) - 3.3
    regrets = [found.regret_moe, found.regret_paper, found.regret_parabola]
    assert [regret.loss for regret in regrets] == pytest.approx(exact.tolist(), abs=2e-4)
    assert found.regret_parabola.rho < 0.74 and found.regret_parabola.loss > 0.001
    assert found.against_moe.mean == pytest.approx(curve(np.array([0.75]))[0] - 3.35) and found.against_moe.resolved


def test_costs_carry_intervals() -> None:
    found = noisy(curve(RHO), 0.001, seeds=3, draw=1, samples=2000)
    for regret, true in ((found.regret_moe, 0.05), (found.regret_paper, curve(np.array([0.8]))[0] - 3.3)):
        assert 0 <= regret.interval[0] <= true <= regret.interval[1] < true + 0.01
    assert found.against_moe.low < found.against_moe.mean < found.against_moe.high < 0


def test_the_gain_of_the_best_is_one_of_all_ratios_differences() -> None:
    """Not a paired interval of its own, which forgets that the best was picked."""
    loss = curve(RHO)[:, None] + np.random.normal(0, 0.01, (9, 3)) + np.array([0.0, 0.1, -0.2])
    found = judge(RHO, loss, samples=9)
    best = int(loss.mean(axis=1).argmin())
    assert found.best == RHO[best] != 1
    assert found.against_moe == differences(loss, [(index, 8) for index in range(8)])[best]


def test_experts_alone_gain_nothing_over_themselves() -> None:
    found = judge(RHO, (3 + 0.1 * (0.1 + RHO) ** -0.5)[:, None] + np.array([0.0, 0.1, -0.2]), samples=9)
    assert found.best == 1 and found.against_moe is None


@pytest.mark.parametrize("seeds", [2, 3])
def test_noise_alone_is_not_resolved(seeds: int) -> None:
    verdicts = [noisy(np.full(9, 3.3), 0.01, seeds, draw, samples=20).verdict for draw in range(1000, 1100)]
    assert verdicts.count("not resolved") >= 90


@pytest.mark.parametrize(("argmin", "sd"), [(0.79, 0.006), (0.5, 0.006)])
def test_the_minimums_interval_covers_at_its_level(argmin: float, sd: float) -> None:
    """With three seeds, where drawing them with replacement covers about 70 %."""
    loss = curve(RHO, argmin)
    intervals = [noisy(loss, sd, 3, draw).argmin_interval for draw in range(40)]
    covered = [low <= argmin <= high for low, high in intervals]
    assert 0.8 < np.mean(covered) <= 1
    # Not by saying nothing.
    assert np.median([high - low for low, high in intervals]) < 0.45


@pytest.mark.parametrize(("end", "sign"), [(1.0, 1), (0.11, -1)])
def test_a_minimum_at_the_end(end: float, sign: int) -> None:
    """Noise bends the curve's end, but not beyond the middle of the last two ratios."""
    offset = 0.1 + (RHO if sign == 1 else 1 - RHO)
    found = [noisy(3 + 0.1 * offset**-0.5, 0.002, 3, draw) for draw in range(12)]
    verdicts = [one.verdict for one in found]
    assert verdicts.count("no interior minimum") >= 9
    clear = found[verdicts.index("no interior minimum")]
    assert clear.argmin == end and end in clear.argmin_interval
    assert f"lowest at the end of the range, rho = {end:g}" in clear.says
    if end == 1:
        assert clear.regret_moe.loss < 0.002 and clear.best >= 0.86


def test_an_end_that_is_not_excluded_is_said() -> None:
    """Among curves whose minimum is near the end, some have 10 to 50 % of their draws at it."""
    found = [noisy(curve(RHO, 0.92, depth=0.005), 0.002, 3, draw) for draw in range(20)]
    between = [one for one in found if one.p_value < 0.05 and 0.1 < sum(one.at_ends) <= 0.5]
    assert between and all(one.verdict == "not resolved" for one in between)
    assert all("of draws have the minimum at an end of the range" in one.says for one in between)


def test_a_minimum_at_the_end_in_most_draws_is_no_interior_one() -> None:
    """Most draws: more than half of them, not four of five."""
    found = [noisy(curve(RHO, 0.97, depth=0.002), 0.002, 3, draw) for draw in range(30)]
    most = [one for one in found if one.p_value < 0.05 and 0.5 < sum(one.at_ends) <= 0.8 and not one.wrong_shape]
    assert most and all(one.verdict == "no interior minimum" for one in most)


def test_the_misfits_test_by_hand() -> None:
    """F of the squares that the curve leaves, with two parameters, at exactly known noise: both sides of 5 %."""
    bent = curve(RHO) + 0.02 * np.array([0, 1, -1, 1, -1, 1, -1, 1, 0])
    pattern = np.resize([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]], (9, 3))
    additive_noise = np.sqrt(np.sum((pattern - pattern.mean(axis=0)) ** 2) / 16)
    rmse, spare = judge(RHO, bent[:, None] + 1e-9 * pattern, samples=9).curve.rmse, len(RHO) - 2
    at_five_percent = np.sqrt(3 * 9 * rmse**2 / spare / f_distribution.isf(0.05, spare, 16)) / additive_noise
    assert judge(RHO, bent[:, None] + 0.98 * at_five_percent * pattern, samples=9).wrong_shape
    assert not judge(RHO, bent[:, None] + 1.02 * at_five_percent * pattern, samples=9).wrong_shape


def test_a_curve_that_still_falls_is_rarely_taken_for_one_with_a_minimum() -> None:
    """It falls to rho = 1, at last by less than noise."""
    found = [noisy(2 + 0.001 * (0.1 + RHO) ** -1.5, 0.001, 3, draw).verdict for draw in range(30)]
    assert found.count("interior minimum") <= 6


def test_an_end_that_is_measurably_worse_is_excluded() -> None:
    """The minimum may lie next to rho = 1: what says that it lies below it are the runs at 1."""
    loss = 2 + 0.01 * (0.1 + RHO) ** -0.5 + 0.0002 / (1.01 - RHO)
    found = [noisy(loss, 0.003, 3, draw) for draw in range(10)]
    assert all(one.verdict == "interior minimum" for one in found)


def test_ties_are_ratios_that_are_not_resolved_from_the_lowest() -> None:
    """0.61 lies 0.001 above the best in every seed by chance: 0.86, which jumps around it, shows what noise does."""
    rho = np.array([0.3, 0.61, 0.75, 0.86, 1.0])
    loss = np.array([[3.5] * 3, [3.401, 3.501, 3.301], [3.4, 3.5, 3.3], [3.45, 3.49, 3.32], [3.6] * 3])
    loss[[0, 4]] += [0, 0.1, -0.1]
    found = judge(rho, loss, samples=50)
    assert found.best == 0.75 and found.tied == (0.61, 0.86)


def test_a_ratio_of_which_a_run_diverged_is_not_the_best() -> None:
    """The other seeds of 0.75 are the lowest; what went well is no sample of all."""
    loss = curve(RHO)[:, None] + np.array([0.0, 0.02, -0.03])
    assert judge(RHO, loss, samples=20).best == 0.75
    loss[5, 1] = np.inf
    found = judge(RHO, loss, samples=20)
    assert found.best == 0.86 and found.seeds == 3 and found.warnings == ()
    assert found.argmin == pytest.approx(0.79, abs=0.015)
    loss[:, 1] = np.inf
    assert judge(RHO, loss, samples=20).best == 0.75
    # A ratio of which all runs diverged is left out.
    loss[:, 1] = loss[:, 0]
    loss[-1] = np.inf
    ended = judge(RHO, loss, samples=20)
    assert ended.rho[-1] == 0.93 and ended.against_moe is None


def test_ranges_that_cost_little() -> None:
    """On the planted curve itself, and with intervals that hold it."""
    found = noisy(curve(RHO), 0.001, seeds=3, draw=12, samples=500)
    fine = np.linspace(RHO[0], 1, 4001)
    for near, nat in zip(found.within, (0.005, 0.01, 0.02), strict=True):
        cheap = fine[curve(fine) <= 3.3 + nat]
        assert near.nat == nat and (near.low, near.high) == pytest.approx((cheap[0], cheap[-1]), abs=0.03)
        assert near.low_interval[0] - 0.01 <= cheap[0] <= near.low_interval[1] + 0.01
        assert near.high_interval[0] - 0.01 <= cheap[-1] <= near.high_interval[1] + 0.01
        assert near.low_interval[0] <= near.low <= near.low_interval[1] < found.argmin < near.high_interval[0]
    assert found.within[0].high < found.within[1].high < found.within[2].high


def test_one_seed_gives_a_fit_and_no_claim() -> None:
    found = judge(RHO, curve(RHO))
    assert found.verdict == "not resolved" and found.argmin == pytest.approx(0.79, abs=0.002)
    assert found.says == "one seed: not resolved; the fit's minimum is at rho = 0.79"
    assert found.argmin_interval is None and found.at_ends is None and found.seed_sd is None
    assert found.regret_moe.interval is None and not found.against_moe.resolved
    assert len(found.tied) == 8 and found.warnings == ("one seed: no intervals",)


@pytest.mark.parametrize("budget", ["2e20", "6e20"])
def test_the_papers_points(budget: str) -> None:
    """The minimum is read off as 75 to 80 %, the lowest point is 85 %, and one run per ratio resolves nothing."""
    found = judge(*paper.allocation()[budget])
    assert found.verdict == "not resolved" and found.best in (0.85, 0.849)
    assert 0.78 < found.argmin < 0.86
    assert found.regret_moe.loss == pytest.approx(0.013, abs=0.002)
    assert found.regret_paper.loss < 0.0005 < found.regret_parabola.loss < 0.001


def test_missing_runs_do_not_bend_the_curve() -> None:
    """A seed far below the others, absent from two ratios: plain means would be off by 0.1."""
    loss = curve(RHO)[:, None] + np.array([0.0, 0.02, -0.3])
    whole = judge(RHO, loss)
    loss[[1, 6], 2] = np.nan
    holes = np.hstack([loss, np.full((9, 1), np.nan)])[::-1]
    found = judge(np.append(RHO[::-1], 0.4), np.vstack([holes, np.full((1, 4), np.nan)]))
    assert found.rho == whole.rho and found.seeds == 3
    assert found.loss == pytest.approx(whole.loss) and found.argmin == pytest.approx(whole.argmin, abs=1e-6)
    assert found.warnings == ("2 of 27 runs are missing",)


def test_seeds_that_overlap_too_little_give_no_interval() -> None:
    loss = np.full((9, 2), np.nan)
    loss[:, 0], loss[4, 1] = curve(RHO), 3.5
    found = judge(RHO, loss)
    assert found.verdict == "not resolved" and found.argmin_interval is None
    assert found.says.startswith("too few runs to know their noise: not resolved; the fit's minimum is at rho = 0.79")


def test_warnings() -> None:
    few = judge(RHO[4:8], curve(RHO[4:8])[:, None] + np.array([0.0, 0.1]))
    assert few.warnings[0] == "4 ratios, fewer than 5: the curve's shape is an assumption"
    assert few.warnings[1].startswith("two seeds") and few.regret_moe is None and few.against_moe is None
    noisier = noisy(curve(RHO), 0.1, 3, draw=3)
    assert any("more than a quarter of the curve's depth" in warning for warning in noisier.warnings)
    steps = np.where(RHO < 0.55, 3.4, 3.3) + 0.02 * (np.arange(9) % 2)
    assert any("wrong shape" in warning for warning in noisy(steps, 0.001, 3, draw=4).warnings)


def test_the_papers_choice_outside_the_range_has_no_cost() -> None:
    rho = np.array([0.1, 0.2, 0.3, 0.5, 0.7])
    assert judge(rho, curve(rho, 0.3)).regret_paper is None


def test_an_optimum_that_moves_and_one_that_does_not() -> None:
    low, high = noisy(curve(RHO, 0.5), 0.0005, 3, draw=5), noisy(curve(RHO, 0.75), 0.0005, 3, draw=6)
    moved = compare(low, high)
    assert moved.verdict == "moves" and moved.difference == pytest.approx(0.25, abs=0.03)
    assert 0.15 < moved.interval[0] < 0.25 < moved.interval[1] < 0.35 and "moves by +0.2" in moved.says
    back = compare(high, low)
    assert back.difference == -moved.difference and back.verdict == "moves"
    same = compare(low, noisy(curve(RHO, 0.5), 0.0005, 3, draw=7))
    assert same.verdict == "not resolved" and same.interval[0] < 0 < same.interval[1]


def test_budgets_are_drawn_apart_from_each_other() -> None:
    """Judged with the same random numbers, their draws must not cancel: of a curve and itself, noise adds up."""
    found = noisy(curve(RHO), 0.002, 3, draw=13, samples=1000)
    moved, own = compare(found, found), found.argmin_interval
    assert moved.verdict == "not resolved" and moved.difference == 0
    assert moved.interval[1] - moved.interval[0] > 1.1 * (own[1] - own[0]) > 0


def test_what_is_not_resolved_does_not_move() -> None:
    sharp, flat = noisy(curve(RHO, 0.3), 0.0005, 3, draw=8), noisy(np.full(9, 3.3), 0.01, 3, draw=1001)
    assert flat.verdict == "not resolved" and compare(sharp, flat).verdict == "not resolved"
    assert compare(sharp, judge(RHO, curve(RHO))).interval is None


def test_the_same_seed_gives_the_same_answer() -> None:
    assert noisy(curve(RHO), 0.003, 3, draw=9) == noisy(curve(RHO), 0.003, 3, draw=9)


def test_results_are_plain_json() -> None:
    three, one = noisy(curve(RHO), 0.003, 3, draw=10), judge(RHO[:5], curve(RHO[:5]))
    for found in (three, one, compare(three, one), compare(three, three), judge(RHO, np.full((9, 3), 3.0), samples=9)):
        assert "resampled" not in json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert three.as_dict()["regret_moe"]["loss"] == three.regret_moe.loss


def test_two_ratios_are_refused() -> None:
    with pytest.raises(UserError, match="2 ratios cannot be judged"):
        judge([0.5, 0.8, 1.0], [3.0, 2.9, np.nan])


def test_the_activated_share_is_that_of_the_models() -> None:
    """Where the experts' term starts from a large activated share, as in small models, the fit needs to know it."""
    loss = 3 + 0.05 * (0.47 + RHO) ** -2.5 + 0.02 * (0.05 + 1 - RHO) ** -0.5
    fine = np.linspace(RHO[0], 1, 2001)
    truth = fine[np.argmin(3 + 0.05 * (0.47 + fine) ** -2.5 + 0.02 * (0.05 + 1 - fine) ** -0.5)]
    found = judge(RHO, noisy_losses(loss), activated_share=0.47)
    assert found.verdict == "interior minimum" and found.argmin == pytest.approx(truth, abs=0.04)
    assert found.curve.p0 == 0.47


def test_runs_that_contradict_the_curve_leave_it_unresolved() -> None:
    """One ratio far below its neighbours: no curve of two terms has such a dip."""
    loss = 3 + 0.05 * RHO
    loss[-2] -= 0.06
    found = judge(RHO, noisy_losses(loss))
    assert found.verdict == "not resolved" and found.wrong_shape and "do not follow the fitted curve" in found.says


def noisy_losses(loss: np.ndarray) -> np.ndarray:
    return loss[:, None] + np.random.default_rng(3).normal(0, 0.0005, (len(loss), 3))
