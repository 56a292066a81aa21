"""What a share costs above the minimum of a fitted curve, and which shares cost little; intervals from draws."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram.sweep.paired import Interval, central_interval
from engram.sweep.u_curve import TwoTerm

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Regret:
    """What the ratio `rho` costs on the fitted curve above its minimum, nats per token."""

    rho: float
    loss: float
    interval: Interval | None


@dataclass(frozen=True)
class Within:
    """The ratios from `low` to `high` cost at most `nat` above the fitted curve's minimum, in the measured range."""

    nat: float
    low: float
    high: float
    # Of each end over draws.
    low_interval: Interval | None
    high_interval: Interval | None


@dataclass(frozen=True)
class Costs:
    """A fitted curve, and `curves` [k, m] of k draws at evenly spaced `places` [m], which span the measured range.

    Draws come from a coarse grid of shapes. `coarse` [m] is that grid's curve of the means: whatever it misses of the
    fitted curve's costs is added to every draw's.
    """

    curve: TwoTerm
    places: Array
    curves: Array
    coarse: Array
    level: float

    def at(self, rho: float) -> Regret | None:
        """None outside of the measured range."""
        low, high = self.places[0], self.places[-1]
        if not low <= rho <= high:
            return None
        value = max(float(self.curve.predict(rho)) - float(self.curve.predict(self.curve.argmin(low, high))), 0.0)
        # Every curve at `rho`, between its neighbours on the grid.
        position = (rho - low) / (high - low) * (len(self.places) - 1)
        left = min(int(position), len(self.places) - 2)
        curves = np.vstack([self.coarse, self.curves])
        here = curves[:, left] + (position - left) * (curves[:, left + 1] - curves[:, left])
        coarse, *draws = here - curves.min(axis=1)
        return Regret(rho, value, central_interval(np.maximum(np.array(draws) + value - coarse, 0.0), self.level))

    def within(self, nat: float) -> Within:
        fitted = self._ends(self.curve.predict(self.places)[None], nat)
        coarse, draws = self._ends(self.coarse[None], nat), self._ends(self.curves, nat)
        low, high = (
            central_interval(np.clip(drawn + end - off, self.places[0], self.places[-1]), self.level)
            for drawn, end, off in zip(draws, fitted, coarse, strict=True)
        )
        return Within(nat, float(fitted[0][0]), float(fitted[1][0]), low, high)

    def _ends(self, curves: Array, nat: float) -> tuple[Array, Array]:
        """First and last place of each of `curves` [k, m], which are convex, that lies low enough."""
        cheap = curves <= curves.min(axis=1, keepdims=True) + nat
        return self.places[np.argmax(cheap, axis=1)], self.places[::-1][np.argmax(cheap[:, ::-1], axis=1)]
