"""Whether the optimum of one budget lies elsewhere than that of another."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from engram.sweep.judge import Allocation
from engram.sweep.paired import Interval, central_interval
from engram.sweep.words import signed


@dataclass(frozen=True)
class Move:
    """Where the second budget's optimum lies minus the first's."""

    difference: float
    interval: Interval | None
    verdict: Literal["moves", "not resolved"]
    says: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: Allocation, b: Allocation, *, seed: int = 0) -> Move:
    """The move from `a` to `b`, both taken as independent of each other."""
    difference = b.argmin - a.argmin
    count = min(len(a.resampled), len(b.resampled))
    if not count:
        says = "one seed or too few runs: whether the optimum moves is not resolved"
        return Move(difference, None, "not resolved", says)
    # Both were drawn with the same random numbers: pairing them would take their noise for a common one.
    shuffled = np.random.default_rng(seed).permutation(b.resampled)[:count]
    interval = central_interval(shuffled - a.resampled[:count], a.level)
    assert interval is not None
    shown = f"by {signed(difference, 2)} ({signed(interval[0], 2)} to {signed(interval[1], 2)})"
    if "not resolved" in (a.verdict, b.verdict):
        return Move(difference, interval, "not resolved", "a curve that is not resolved has no optimum that could move")
    if interval[0] <= 0 <= interval[1]:
        return Move(difference, interval, "not resolved", f"whether the optimum moves is not resolved: {shown}")
    return Move(difference, interval, "moves", f"the optimum moves {shown}")
