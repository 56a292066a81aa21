"""What was promised about a contest, and whether a measurement keeps it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Target(Protocol):
    """`measured` takes seconds and ideal bytes by contender; it is None where a contender that it needs did not run."""

    @property
    def claim(self) -> str: ...

    @property
    def limit(self) -> float: ...

    def measured(self, seconds: dict[str, float], ideal_bytes: dict[str, int]) -> float | None: ...

    def is_met(self, measured: float) -> bool: ...

    def show(self, measured: float) -> str: ...


@dataclass(frozen=True)
class Speedup:
    """`ours` is at least `limit` times as fast as the fastest of `others`."""

    ours: str
    others: Sequence[str]
    limit: float

    @property
    def claim(self) -> str:
        best = "the best of " if len(self.others) > 1 else ""
        return f"{self.ours}: at least {self.limit:g} x the speed of {best}{', '.join(self.others)}"

    def measured(self, seconds: dict[str, float], ideal_bytes: dict[str, int]) -> float | None:
        others = [seconds[name] for name in self.others if name in seconds]
        return min(others) / seconds[self.ours] if others and self.ours in seconds else None

    def is_met(self, measured: float) -> bool:
        return measured >= self.limit

    def show(self, measured: float) -> str:
        return f"{measured:.2f} x"


@dataclass(frozen=True)
class Bandwidth:
    """`ours` moves its ideal bytes at `limit` times the speed at which `copy` moves its own, or faster."""

    ours: str
    copy: str
    limit: float

    @property
    def claim(self) -> str:
        return f"{self.ours}: at least {self.limit:.0%} of the bandwidth of {self.copy}"

    def measured(self, seconds: dict[str, float], ideal_bytes: dict[str, int]) -> float | None:
        if self.ours not in seconds or self.copy not in seconds:
            return None
        ours, copy = (ideal_bytes[name] / seconds[name] for name in (self.ours, self.copy))
        return ours / copy

    def is_met(self, measured: float) -> bool:
        return measured >= self.limit

    def show(self, measured: float) -> str:
        return f"{measured:.0%}"


@dataclass(frozen=True)
class Overhead:
    """`with_it` takes at most `limit` longer than `without`; the difference counts `share` times."""

    with_it: str
    without: str
    limit: float
    share: float = 1.0

    @property
    def claim(self) -> str:
        share = "" if self.share == 1 else f" (the difference counted {self.share:.3g} times)"
        return f"{self.with_it}: at most {self.limit:+.0%} over {self.without}{share}"

    def measured(self, seconds: dict[str, float], ideal_bytes: dict[str, int]) -> float | None:
        if self.with_it not in seconds or self.without not in seconds:
            return None
        return (seconds[self.with_it] / seconds[self.without] - 1) * self.share

    def is_met(self, measured: float) -> bool:
        return measured <= self.limit

    def show(self, measured: float) -> str:
        return f"{measured:+.1%}"
