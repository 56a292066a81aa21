"""Training speed: tokens per second of training, evaluation, statistics and saving left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from its creation; `lap` reads the speed since the last lap, `seconds_left` extrapolates the whole run."""

    def __init__(self, step: int, tokens_per_step: int) -> None:
        self._first_step = self._lap_step = step
        self._tokens_per_step = tokens_per_step
        self._start = self._lap_start = time.perf_counter()
        self._warm = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        pause = time.perf_counter()
        try:
            yield
        finally:
            self._lap_start += time.perf_counter() - pause

    def lap(self, step: int) -> float:
        """Tokens per second since the last lap."""
        now = time.perf_counter()
        speed = (step - self._lap_step) * self._tokens_per_step / (now - self._lap_start)
        self._lap_start, self._lap_step = now, step
        return speed

    def seconds_left(self, step: int, last_step: int) -> float:
        """At the speed of this process so far, pauses included."""
        now = time.perf_counter()
        seconds = (now - self._start) / max(1, step - self._first_step) * (last_step - step)
        if not self._warm:
            # The first steps compile and allocate.
            self._start, self._first_step, self._warm = now, step, True
        return seconds
