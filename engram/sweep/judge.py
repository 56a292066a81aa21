"""Where the optimum of an allocation curve lies, and whether the seeds say so.

Verdicts, in this order:
- "not resolved": one seed, too few runs to know their noise, or differences between ratios that the noise of runs alone
  makes in more than 5 % of cases (F test, after seeds' common levels are taken away);
- "no interior minimum": in most draws of the seeds the curve's minimum is at an end of the measured range;
- "interior minimum": in at most 10 % of draws it is;
- "not resolved": all between (to call these interior would be wrong for one monotone curve in three), and curves that
  the runs contradict: they miss the means by more than noise explains, or are lowest at an end whose runs are
  measurably worse than others.

A minimum nearer to an end than to the next measured ratio counts as at the end, since no run tells them apart: unless
the runs at the end itself are measurably worse than the best ratio's (`simultaneous.tied_with`).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import f as f_distribution

from engram.config_file import UserError
from engram.sweep.costs import Costs, Regret, Within
from engram.sweep.paired import (
    Additive,
    Difference,
    Interval,
    additive,
    central_interval,
    resampled_means,
)
from engram.sweep.simultaneous import differences, tied_with
from engram.sweep.u_curve import ACTIVATED_SHARE, Family, Parabola, TwoTerm, fit_parabola

Array = NDArray[np.float64]
Verdict = Literal["interior minimum", "no interior minimum", "not resolved"]

# The paper's recommended share of experts (its text says 75 to 80 %).
PAPERS_CHOICE = 0.8
# Costs above the minimum, nats per token, whose ranges of ratios are said.
NEAR = (0.005, 0.01, 0.02)
FEWEST_RATIOS = 5
# Probability below which differences between ratios are taken as more than noise.
_RESOLVED = 0.05
# Share of draws with their minimum at an end up to which the end is excluded.
_EXCLUDED = 0.1
# Share of the depth below which a misfit does not matter.
_SMALL = 0.02
_PLACES = 401
# Floor and scale of one term: bounds leave the rest less freedom than a parameter each, and fewer count as caution.
_PARAMETERS = 2


@dataclass(frozen=True)
class Allocation:
    """What the curve of one budget says; intervals are None with one seed, or too few runs to know their noise."""

    rho: tuple[float, ...]
    # Means over seeds.
    loss: tuple[float, ...]
    seeds: int
    level: float
    verdict: Verdict
    curve: TwoTerm
    parabola: Parabola
    # Median over draws; with one seed that of the fit.
    argmin: float
    argmin_interval: Interval | None
    # The fit's value at its own minimum.
    loss_at_minimum: float
    # From the fitted curve's higher end down to its minimum.
    depth: float
    # Noise of one run beside what its seed does at all ratios; None where nothing is left to estimate it from.
    seed_sd: float | None
    p_value: float | None
    # Shares of draws with their minimum at the lower and upper end.
    at_ends: tuple[float, float] | None
    # The measured ratio of the lowest mean, those left aside of which a run diverged, and the others that are not
    # resolved from it, all compared at once.
    best: float
    tied: tuple[float, ...]
    # The best measured ratio minus rho = 1, as measured, with an interval that holds whichever ratio is the best; None
    # where rho = 1 is the best itself, or was not measured.
    against_moe: Difference | None
    # None where the ratio lies outside the measured range.
    regret_moe: Regret | None
    regret_parabola: Regret
    regret_paper: Regret | None
    # For each of NEAR.
    within: tuple[Within, ...]
    # The curve misses the means by more than noise, or is lowest at an end whose runs are measurably worse than others.
    wrong_shape: bool
    warnings: tuple[str, ...]
    # The minimum's place in each draw.
    resampled: Array = field(repr=False, compare=False)

    @property
    def says(self) -> str:
        """The verdict in one sentence, with its reason."""
        if self.argmin_interval is None or self.at_ends is None:
            known = "one seed" if self.seeds == 1 else "too few runs to know their noise"
            return f"{known}: not resolved; the fit's minimum is at rho = {self.argmin:.2f}"
        lower, upper = self.at_ends
        if self.p_value is None or not self.p_value < _RESOLVED:
            return f"not resolved: seeds differ as much as ratios do (p = {self.p_value or 1:.2f})"
        if self.wrong_shape:
            return f"not resolved: the runs do not follow the fitted curve; the lowest were measured at {self.best:.2f}"
        if self.verdict == "no interior minimum":
            end, share = (self.rho[0], lower) if lower > upper else (self.rho[-1], upper)
            other = f" ({lower + upper - share:.0%} at the other end)" if share <= 0.5 else ""
            return f"no interior minimum: lowest at the end of the range, rho = {end:g}, in {share:.0%} of draws{other}"
        low, high = self.argmin_interval
        place = f"rho = {self.argmin:.2f} ({low:.2f} to {high:.2f}, {self.level:.0%})"
        if self.verdict == "not resolved":
            return f"not resolved: {lower + upper:.0%} of draws have the minimum at an end of the range; {place}"
        return f"interior minimum at {place}, {self.depth:.4f} nats below the higher end"

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "resampled"} | {"says": self.says}


def judge(
    rho: ArrayLike,
    loss: ArrayLike,
    *,
    activated_share: float = ACTIVATED_SHARE,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.9,
) -> Allocation:
    """Fit the means over seeds of `loss` [n, s] at `rho` [n], and refit them for `samples` draws over seeds.

    activated_share: activated over sparse parameters, the curve's p0. A missing run is NaN, one that diverged infinite.
    Raises UserError: fewer than three ratios with a finished run.
    """
    rho, loss = _finished(np.asarray(rho, dtype=float), np.asarray(loss, dtype=float))
    low, high = float(rho[0]), float(rho[-1])
    found = additive(loss)
    family = Family(rho, activated_share=activated_share)
    curve, parabola = family.polished(found.means), fit_parabola(rho, found.means)
    minimum = curve.argmin(low, high)
    places = np.linspace(low, high, _PLACES)
    curves = family.curves(resampled_means(found, samples, seed), places)
    # The grid of shapes is coarse: its minimum of the means is where the refined one should be.
    coarse = family.curves(found.means[None], places)[0]
    best = _lowest(loss, found.means)
    tied = tied_with(loss, best, level)
    excluded = [end != best and end not in tied for end in (0, len(rho) - 1)]
    resampled = _at_ends(rho, places[np.argmin(curves, axis=1)] + minimum - places[np.argmin(coarse)], excluded)
    loss_at_minimum = float(curve.predict(minimum))
    depth = float(curve.predict([low, high]).max()) - loss_at_minimum

    costs = Costs(curve, places, curves, coarse, level)
    at_parabola = costs.at(parabola.argmin(low, high))
    assert at_parabola is not None
    ends = (float(np.mean(resampled == low)), float(np.mean(resampled == high))) if len(resampled) else None
    interval = central_interval(resampled, level)
    misfit = _is_misfit(loss, found, depth, curve.rmse)
    contradicted = ends is not None and any(share > _EXCLUDED for share, out in zip(ends, excluded, strict=True) if out)
    verdict = "not resolved" if misfit or contradicted else _verdict(found, ends)
    argmin = float(np.median(resampled)) if len(resampled) else minimum
    return Allocation(
        rho=tuple(float(value) for value in rho),
        loss=tuple(float(value) for value in found.means),
        seeds=loss.shape[1],
        level=level,
        verdict=verdict,
        curve=curve,
        parabola=parabola,
        argmin=argmin,
        argmin_interval=interval,
        loss_at_minimum=loss_at_minimum,
        depth=depth,
        seed_sd=found.noise,
        p_value=found.p_value,
        at_ends=ends,
        best=float(rho[best]),
        tied=tuple(float(rho[index]) for index in tied),
        against_moe=_from_last(loss, best, level) if high == 1 else None,
        regret_moe=costs.at(1.0),
        regret_parabola=at_parabola,
        regret_paper=costs.at(PAPERS_CHOICE),
        within=tuple(costs.within(nat) for nat in NEAR),
        wrong_shape=bool(misfit or contradicted),
        warnings=_warnings(rho, loss, found, depth, curve.rmse),
        resampled=resampled,
    )


def _finished(rho: Array, loss: Array) -> tuple[Array, Array]:
    """Ratios and seeds that have a finished run, by ascending ratio."""
    loss = loss[:, None] if loss.ndim == 1 else loss
    points, seeds = np.isfinite(loss).any(axis=1), np.isfinite(loss).any(axis=0)
    rho, loss = rho[points], loss[np.ix_(points, seeds)]
    if len(np.unique(rho)) < 3:
        raise UserError(f"a curve through {len(np.unique(rho))} ratios cannot be judged: finish runs at 3 or more")
    order = np.argsort(rho)
    return rho[order], loss[order]


def _from_last(loss: Array, best: int, level: float) -> Difference | None:
    """The point `best` minus the last one."""
    last = len(loss) - 1
    return None if best == last else differences(loss, [(index, last) for index in range(last)], level)[best]


def _lowest(loss: Array, means: Array) -> int:
    """Where a run diverged, the others are those that went well: such a ratio is not taken as better than others."""
    diverged = np.isinf(loss).any(axis=1)
    return int(np.argmin(means if diverged.all() else np.where(diverged, np.inf, means)))


def _verdict(found: Additive, ends: tuple[float, float] | None) -> Verdict:
    if ends is None or found.p_value is None or not found.p_value < _RESOLVED:
        return "not resolved"
    if sum(ends) <= _EXCLUDED:
        return "interior minimum"
    return "no interior minimum" if sum(ends) > 0.5 else "not resolved"


def _at_ends(rho: Array, places: Array, excluded: list[bool]) -> Array:
    """Places nearer to an end than to the next ratio are put at the end, unless it is excluded."""
    first, second, *_ = different = np.unique(rho)
    before, last = different[-2:]
    at_first = places < (first if excluded[0] else (first + second) / 2)
    at_last = places > (last if excluded[1] else (before + last) / 2)
    return np.where(at_first, first, np.where(at_last, last, places))


def _warnings(rho: Array, loss: Array, found: Additive, depth: float, rmse: float) -> tuple[str, ...]:
    notes = []
    if len(rho) < FEWEST_RATIOS:
        notes.append(f"{len(rho)} ratios, fewer than {FEWEST_RATIOS}: the curve's shape is an assumption")
    if loss.shape[1] == 1:
        notes.append("one seed: no intervals")
    elif loss.shape[1] == 2:
        notes.append("two seeds: intervals are several times as long as with three")
    if found.noise is not None and found.noise > depth / 4:
        notes.append(f"a run's noise of {found.noise:.4f} is more than a quarter of the curve's depth of {depth:.4f}")
    if _is_misfit(loss, found, depth, rmse):
        notes.append(
            f"the curve misses the means by {rmse:.4f}, more than noise does: its minimum is that of a wrong shape"
        )
    missing = int(np.isnan(loss).sum())
    if missing:
        notes.append(f"{missing} of {loss.size} runs are missing")
    return tuple(notes)


def _is_misfit(loss: Array, found: Additive, depth: float, rmse: float) -> bool:
    return rmse > _SMALL * depth and _misfit(loss, found, rmse) < _RESOLVED


def _misfit(loss: Array, found: Additive, rmse: float) -> float:
    """Probability of missing the means by as much as `rmse`, if the curve had the right shape (F test)."""
    points, seeds = loss.shape
    spare = points - _PARAMETERS
    if not found.noise:
        return 1.0
    return float(f_distribution.sf(seeds * points * rmse**2 / spare / found.noise**2, spare, found.freedom))
