"""The shape of loss over rho, the experts' share of the sparse parameters: two diminishing returns that add up."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

# Share of the activated parameters beside the sparse ones: experts help a model that has this much already.
ACTIVATED_SHARE = 0.1
# What is searched: exponents, and the offset that says how steeply the first memory pays.
_EXPONENTS = np.geomspace(0.05, 4.0, 16)
_OFFSETS = np.geomspace(0.004, 1.0, 12)
# Prefers plain exponents where the data leave a choice: too weak to move a fit that they determine.
_RIDGE = 1e-6
_PLAIN = np.log([0.5, 0.5, 0.1])
_BLOCK = 8


@dataclass(frozen=True)
class TwoTerm:
    """L = floor + experts (p0 + rho)^-a + memory (m0 + 1 - rho)^-b, convex in rho."""

    floor: float
    experts: float
    memory: float
    a: float
    b: float
    p0: float
    m0: float
    rmse: float

    def predict(self, rho: ArrayLike) -> Array:
        rho = np.asarray(rho, dtype=float)
        experts = self.experts * (self.p0 + rho) ** -self.a
        return self.floor + experts + self.memory * (self.m0 + 1 - rho) ** -self.b

    def argmin(self, low: float, high: float) -> float:
        """The lowest place between `low` and `high`; the curve is convex, so that there is one."""
        grid = np.linspace(low, high, 2001)
        return float(grid[np.argmin(self.predict(grid))])


@dataclass(frozen=True)
class Parabola:
    """L = c0 + c1 rho + c2 rho^2: what is usually drawn, and misplaces the minimum of a lopsided curve."""

    c0: float
    c1: float
    c2: float
    rmse: float

    def predict(self, rho: ArrayLike) -> Array:
        rho = np.asarray(rho, dtype=float)
        return self.c0 + self.c1 * rho + self.c2 * rho**2

    def argmin(self, low: float, high: float) -> float:
        vertex = -self.c1 / (2 * self.c2) if self.c2 > 0 else np.inf
        if low <= vertex <= high:
            return float(vertex)
        return low if self.predict(low) < self.predict(high) else high


def fit_parabola(rho: Array, loss: Array) -> Parabola:
    """Least squares over all points, at least three of which differ."""
    c2, c1, c0 = np.polyfit(rho, loss, 2)
    found = Parabola(float(c0), float(c1), float(c2), 0.0)
    return Parabola(found.c0, found.c1, found.c2, _rmse(loss - found.predict(rho)))


class Family:
    """All curves over fixed ratios [n]: the projections of a grid of shapes, which any number of losses can share.

    Least squares by variable projection: exponents and offset are searched, floor and scales follow. Eight to ten
    points do not tell p0 from a: p0 is fixed to `activated_share`. m0 stays within 0.004 to 1, a and b within 0.05 to
    4, since a term of a larger exponent or a smaller offset is a step at one point. Neither term can help with a
    negative scale.
    """

    def __init__(self, rho: Array, *, activated_share: float = ACTIVATED_SHARE) -> None:
        self.rho, self.p0 = rho, activated_share
        # Shapes of the memory term: every pair of b and m0.
        self.b, self.m0 = (grid.ravel() for grid in np.meshgrid(_EXPONENTS, _OFFSETS, indexing="ij"))
        self.a = _EXPONENTS
        self.penalty = _penalty(self.a[:, None], self.b, self.m0)

    @cached_property
    def _terms(self) -> tuple[Array, Array]:
        """Centred shapes: experts [A, n] and memory [B, n]."""
        experts = (self.p0 + self.rho) ** -self.a[:, None]
        memory = (self.m0[:, None] + 1 - self.rho) ** -self.b[:, None]
        return _centred(experts), _centred(memory)

    def curves(self, losses: Array, at: Array) -> Array:
        """The best curve of the grid for each of `losses` [k, n], at the ratios `at` [m]: [k, m]."""
        experts_at = (self.p0 + at) ** -self.a[:, None]
        memory_at = (self.m0[:, None] + 1 - at) ** -self.b[:, None]
        experts_mean = np.mean((self.p0 + self.rho) ** -self.a[:, None], axis=1)
        memory_mean = np.mean((self.m0[:, None] + 1 - self.rho) ** -self.b[:, None], axis=1)
        found = np.empty((len(losses), len(at)))
        # All pairs of shapes for a few losses at a time fit into the processor's cache.
        for start in range(0, len(losses), _BLOCK):
            block = losses[start : start + _BLOCK]
            best, first, second = self._search(block)
            i, j = np.divmod(best, len(self.b))
            floor = block.mean(axis=1) - first * experts_mean[i] - second * memory_mean[j]
            found[start : start + _BLOCK] = (
                floor[:, None] + first[:, None] * experts_at[i] + second[:, None] * memory_at[j]
            )
        return found

    def polished(self, loss: Array) -> TwoTerm:
        """The best of the grid, and from there the best of all."""
        best, _, _ = self._search(loss[None])
        i, j = np.divmod(int(best[0]), len(self.b))
        start = np.log([self.a[i], self.b[j], self.m0[j]])
        limits = [np.log([grid[0], grid[-1]]) for grid in (_EXPONENTS, _EXPONENTS, _OFFSETS)]
        scale = float(np.sum(_centred(loss) ** 2)) or 1.0

        def objective(shape: Array) -> float:
            a, b, m0 = np.exp(shape)
            return self._solve(loss, a, b, m0)[0] / scale + float(_penalty(a, b, m0))

        found = minimize(objective, start, method="Nelder-Mead", bounds=limits, options={"xatol": 1e-4, "fatol": 1e-12})
        shape = found.x if found.fun < objective(start) else start
        a, b, m0 = (float(value) for value in np.exp(shape))
        _, floor, experts, memory = self._solve(loss, a, b, m0)
        curve = TwoTerm(floor, experts, memory, a, b, self.p0, m0, 0.0)
        return TwoTerm(floor, experts, memory, a, b, self.p0, m0, _rmse(loss - curve.predict(self.rho)))

    def _solve(self, loss: Array, a: float, b: float, m0: float) -> tuple[float, float, float, float]:
        """Squared error, floor and both scales of given shapes."""
        shapes = np.stack([(self.p0 + self.rho) ** -a, (m0 + 1 - self.rho) ** -b])
        f, g = _centred(shapes)
        y = _centred(loss)
        first, second = _scales(f @ y, g @ y, f @ f, g @ g, f @ g)
        floor = float(np.mean(loss - first * shapes[0] - second * shapes[1]))
        return float(np.sum((y - first * f - second * g) ** 2)), floor, float(first), float(second)

    def _search(self, losses: Array) -> tuple[Array, Array, Array]:
        """For losses [k, n]: the best pair of shapes as one index, and its scales."""
        f, g = self._terms
        y = _centred(losses)
        fy, gy = (y @ f.T)[:, :, None], (y @ g.T)[:, None, :]
        ff, gg, fg = np.sum(f * f, axis=1)[:, None], np.sum(g * g, axis=1), f @ g.T
        first, second = _scales(fy, gy, ff, gg, fg)
        gain = 2 * (first * fy + second * gy) - first**2 * ff - second**2 * gg - 2 * first * second * fg
        scale = np.maximum(np.sum(y * y, axis=1), np.finfo(float).tiny)[:, None, None]
        score = (gain / scale - self.penalty).reshape(len(losses), -1)
        best = np.argmax(score, axis=1)
        rows = np.arange(len(losses))
        return best, first.reshape(len(losses), -1)[rows, best], second.reshape(len(losses), -1)[rows, best]


def _centred(values: Array) -> Array:
    """Without the mean over the last axis: the floor is projected out."""
    return np.asarray(values - values.mean(axis=-1, keepdims=True))


def _scales(fy: Any, gy: Any, ff: Any, gg: Any, fg: Any) -> tuple[Any, Any]:
    """Non-negative least squares with two variables, by their inner products: both, or the better one alone."""
    determinant = ff * gg - fg**2
    safe = np.where(determinant > 1e-12 * ff * gg, determinant, np.inf)
    first, second = (gg * fy - fg * gy) / safe, (ff * gy - fg * fy) / safe
    alone_first, alone_second = np.maximum(fy, 0) / ff, np.maximum(gy, 0) / gg
    both = (first > 0) & (second > 0)
    prefer_first = alone_first**2 * ff >= alone_second**2 * gg
    return (
        np.where(both, first, np.where(prefer_first, alone_first, 0.0)),
        np.where(both, second, np.where(prefer_first, 0.0, alone_second)),
    )


def _penalty(a: Any, b: Any, m0: Any) -> Any:
    return _RIDGE * sum((np.log(value) - plain) ** 2 for value, plain in zip((a, b, m0), _PLAIN, strict=True))


def _rmse(residual: Array) -> float:
    return float(np.sqrt(np.mean(residual**2)))
