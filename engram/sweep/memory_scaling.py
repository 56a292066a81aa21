"""What more memory buys beside a backbone that stays: a straight line in log rows, or a power law that levels off."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from engram.config_file import UserError
from engram.sweep.paired import Interval, additive, central_interval, paired_difference, resampled_means
from engram.sweep.words import signed

Array = NDArray[np.float64]
Fit = Callable[[Array, Array], "LogLinear | PowerLaw"]

# Fewer points or a shorter range leave the kind of law open, and a power law's exponent worse than open.
FEWEST_POINTS = 5
SHORTEST_RANGE = 1.5
_LOWEST_BETA, _HIGHEST_BETA = 0.01, 5.0


@dataclass(frozen=True)
class LogLinear:
    """L = c - b log10(rows)."""

    c: float
    b: float
    r2: float | None
    # Root mean square of the errors at points left out of the fit; None where too few points stay.
    left_out: float | None = None

    def predict(self, rows: ArrayLike) -> Array:
        return self.c - self.b * np.log10(np.asarray(rows, dtype=float))


@dataclass(frozen=True)
class PowerLaw:
    """L = floor + scale rows^-beta, scale >= 0; `middle` is where rows are 1, for the numbers' sake."""

    floor: float
    scale: float
    beta: float
    middle: float
    r2: float | None
    left_out: float | None = None

    def predict(self, rows: ArrayLike) -> Array:
        return self.floor + self.scale * (np.asarray(rows, dtype=float) / self.middle) ** -self.beta


@dataclass(frozen=True)
class Scaling:
    """Both laws, which of them predicts left-out points better, and the slope's interval (None with one seed)."""

    rows: tuple[float, ...]
    seeds: int
    log_linear: LogLinear
    power_law: PowerLaw
    preferred: Literal["log-linear", "power law", "not resolved"]
    per_decade: float
    per_decade_interval: Interval | None
    per_doubling: float
    per_doubling_interval: Interval | None
    level: float
    warnings: tuple[str, ...]
    says: str
    # Which of the seeds that were given have a finished run.
    finished: tuple[bool, ...]
    # c and b of each draw, [k, 2]: what `offset` draws its intervals from.
    resampled: Array = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "resampled"}


@dataclass(frozen=True)
class Offset:
    """How far two log-linear laws lie apart at `at` rows, the middle (in log) of the range that both measured.

    loss: the second model's minus the first's; rows_factor: how many times the rows the second needs for the first's
    loss. None: a law that does not fall has no such factor.
    """

    at: float
    loss: float
    loss_interval: Interval | None
    rows_factor: float | None
    rows_factor_interval: Interval | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_scaling(rows: ArrayLike, loss: ArrayLike, *, samples: int = 2000, seed: int = 0, level: float = 0.9) -> Scaling:
    """Both laws through the means over seeds of `loss` [n, s] at `rows` [n], by least squares.

    A missing run is NaN, one that diverged infinite, and 0 rows are left out. Intervals come from draws over seeds,
    one for all points. A law is preferred if its errors at left-out points are smaller, and the difference of absolute
    errors is resolved over points (Student's t at `level`). Raises UserError: fewer than three sizes.
    """
    finished = np.isfinite(np.atleast_2d(np.asarray(loss, dtype=float).T)).any(axis=1)
    rows, loss = _finished(np.asarray(rows, dtype=float), np.asarray(loss, dtype=float))
    found = additive(loss)
    log_linear, power_law = _fit_log_linear(rows, found.means), _fit_power_law(rows, found.means)
    line_errors = _left_out_errors(_fit_log_linear, rows, found.means, fewest=4)
    power_errors = _left_out_errors(_fit_power_law, rows, found.means, fewest=5)
    preferred: Literal["log-linear", "power law", "not resolved"] = "not resolved"
    short = len(rows) < FEWEST_POINTS or np.log10(rows[-1] / rows[0]) < SHORTEST_RANGE
    if line_errors is not None and power_errors is not None and not short:
        difference = paired_difference(np.abs(line_errors), np.abs(power_errors), level)
        if difference is not None and difference.resolved:
            preferred = "log-linear" if difference.mean < 0 else "power law"
    resampled = resampled_means(found, samples, seed) @ np.linalg.pinv(_design(rows)).T
    interval = central_interval(resampled[:, 1], level)
    doubling = float(np.log10(2))
    return Scaling(
        rows=tuple(float(size) for size in rows),
        seeds=loss.shape[1],
        log_linear=LogLinear(log_linear.c, log_linear.b, log_linear.r2, _rms(line_errors)),
        power_law=PowerLaw(**{**asdict(power_law), "left_out": _rms(power_errors)}),
        preferred=preferred,
        per_decade=log_linear.b,
        per_decade_interval=interval,
        per_doubling=log_linear.b * doubling,
        per_doubling_interval=None if interval is None else (interval[0] * doubling, interval[1] * doubling),
        level=level,
        warnings=_warnings(rows, loss),
        says=_sentence(log_linear.b, interval, preferred),
        finished=tuple(bool(seed) for seed in finished),
        resampled=resampled,
    )


def offset(first: Scaling, second: Scaling) -> Offset:
    """The second model's distance from the first, for example OverEncoding's from Engram's.

    Both need their seeds in the same order. Where the same ones have finished, draws are the same and the interval is
    paired; where not, there is no interval, and a warning.
    """
    low, high = max(min(first.rows), min(second.rows)), min(max(first.rows), max(second.rows))
    at = float(np.sqrt(low * high))
    warnings: tuple[str, ...] = ()
    if low > high:
        warnings = ("the two models share no range of rows: their distance is extrapolated",)
    laws = np.array([[[law.log_linear.c, law.log_linear.b]] for law in (first, second)])
    loss, factor = _apart(laws[0], laws[1], at)
    loss_interval = factor_interval = None
    if first.finished != second.finished:
        warnings += ("the two models have finished different seeds: their distance carries what these do to both",)
    elif len(first.resampled) and len(first.resampled) == len(second.resampled):
        losses, factors = _apart(first.resampled, second.resampled, at)
        loss_interval = central_interval(losses, first.level)
        # A slope that is zero or less in more draws than lie above the interval leaves it without an upper end.
        if np.mean(np.isinf(factors)) < (1 - first.level) / 2 - 1 / len(factors):
            factor_interval = central_interval(factors, first.level)
    rows_factor = float(factor[0]) if np.isfinite(factor[0]) else None
    return Offset(at, float(loss[0]), loss_interval, rows_factor, factor_interval, warnings)


def _apart(first: Array, second: Array, at: float) -> tuple[Array, Array]:
    """Loss differences [k] and factors of rows [k] of laws [k, 2]."""
    loss = (second[:, 0] - first[:, 0]) - (second[:, 1] - first[:, 1]) * np.log10(at)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return loss, np.where(second[:, 1] > 0, 10.0 ** (loss / second[:, 1]), np.inf)


def _design(rows: Array) -> Array:
    return np.stack([np.ones(len(rows)), -np.log10(rows)], axis=1)


def _fit_log_linear(rows: Array, loss: Array) -> LogLinear:
    c, b = np.linalg.lstsq(_design(rows), loss, rcond=None)[0]
    line = LogLinear(float(c), float(b), None)
    return LogLinear(line.c, line.b, _r2(loss, line.predict(rows)))


def _fit_power_law(rows: Array, loss: Array) -> PowerLaw:
    """Variable projection: floor and scale follow from the exponent, which is searched on a grid and then refined."""
    middle = float(np.exp(np.log(rows).mean()))

    def solve(log_beta: float) -> tuple[float, float, float]:
        shape = (rows / middle) ** -np.exp(log_beta)
        centred = shape - shape.mean()
        scale = max(float(centred @ loss / (centred @ centred)), 0.0)
        floor = float(loss.mean() - scale * shape.mean())
        return float(np.sum((loss - floor - scale * shape) ** 2)), floor, scale

    grid = np.linspace(np.log(_LOWEST_BETA), np.log(_HIGHEST_BETA), 40)
    best = int(np.argmin([solve(beta)[0] for beta in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(lambda beta: solve(beta)[0], bounds=bounds, method="bounded", options={"xatol": 1e-6})
    log_beta = float(min(grid[best], refined.x, key=lambda beta: solve(beta)[0]))
    _, floor, scale = solve(log_beta)
    law = PowerLaw(floor, scale, float(np.exp(log_beta)), middle, None)
    return PowerLaw(floor, scale, law.beta, middle, _r2(loss, law.predict(rows)))


def _left_out_errors(fit: Fit, rows: Array, loss: Array, fewest: int) -> Array | None:
    """Each point minus the prediction of a fit to all others."""
    if len(rows) < fewest:
        return None
    others = [np.arange(len(rows)) != index for index in range(len(rows))]
    return np.array(
        [loss[index] - fit(rows[keep], loss[keep]).predict(rows[index]) for index, keep in enumerate(others)]
    )


def _finished(rows: Array, loss: Array) -> tuple[Array, Array]:
    """Sizes above 0 and seeds that have a finished run, by ascending size."""
    loss = loss[:, None] if loss.ndim == 1 else loss
    points, seeds = np.isfinite(loss).any(axis=1) & (rows > 0), np.isfinite(loss).any(axis=0)
    rows, loss = rows[points], loss[np.ix_(points, seeds)]
    if len(np.unique(rows)) < 3:
        raise UserError(
            f"a scaling law through {len(np.unique(rows))} sizes of memory cannot be fitted: finish 3 or more"
        )
    order = np.argsort(rows)
    return rows[order], loss[order]


def _warnings(rows: Array, loss: Array) -> tuple[str, ...]:
    found = []
    if len(rows) < FEWEST_POINTS:
        found.append(f"{len(rows)} sizes of memory, fewer than {FEWEST_POINTS}: the kind of law stays open")
    decades = float(np.log10(rows[-1] / rows[0]))
    if decades < SHORTEST_RANGE:
        found.append(f"{decades:.2g} decades of rows, less than {SHORTEST_RANGE}: the kind of law stays open")
    if loss.shape[1] == 1:
        found.append("one seed: the slope has no interval")
    elif loss.shape[1] == 2:
        found.append("two seeds: intervals are several times as long as with three")
    missing = int(np.isnan(loss).sum())
    if missing:
        found.append(f"{missing} of {loss.size} runs are missing")
    return tuple(found)


def _sentence(b: float, interval: Interval | None, preferred: str) -> str:
    text = f"ten times the rows change the loss by {signed(-b, 4)}"
    if interval is None:
        text += " (no interval)"
    else:
        text += f" ({signed(-interval[1], 4)} to {signed(-interval[0], 4)})"
        if interval[0] <= 0 <= interval[1]:
            text += ", not resolved from zero"
    if preferred == "not resolved":
        return (
            f"{text}; a straight line in log rows and a law that levels off predict left-out points about equally well"
        )
    kind = "a straight line in log rows" if preferred == "log-linear" else "a power law that levels off"
    return f"{text}; {kind} predicts left-out points better"


def _r2(loss: Array, predicted: Array) -> float | None:
    spread = float(np.sum((loss - loss.mean()) ** 2))
    return 1 - float(np.sum((loss - predicted) ** 2)) / spread if spread else None


def _rms(errors: Array | None) -> float | None:
    return None if errors is None else float(np.sqrt(np.mean(errors**2)))
