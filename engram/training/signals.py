"""SIGINT and SIGTERM: the first asks the loop to finish its step and save, the second stops at once."""

import logging
import signal
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class StopRequest:
    """`received` turns True once a signal has come in, while the `with` block lasts."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()
        logger.warning("%s: finishing this step, then saving; once more stops at once", signal.Signals(number).name)

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
