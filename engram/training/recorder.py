"""What a run tells of its steps: metrics.jsonl for machines, W&B, log and progress bar for people."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engram.config import Config
from engram.training.console import RunConsole
from engram.training.metrics import MetricsFile
from engram.training.tracking import Tracker


class Recorder:
    """Records steps from `step` on, while the `with` block lasts; silent where another rank speaks for all."""

    def __init__(
        self, config: Config, run_dir: Path, run_id: str, step: int, console: RunConsole, silent: bool
    ) -> None:
        self._console = console
        self._silent = silent
        self._exit_code = 1
        if not silent:
            self._metrics = MetricsFile(run_dir / "metrics.jsonl", step)
            self._tracker = Tracker(config, run_dir, run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._silent:
            self._tracker.finish(self._exit_code)
            self._metrics.__exit__(kind, error, traceback)

    def write(self, line: dict[str, Any], seconds_left: float) -> None:
        """A step that is logged."""
        if not self._silent:
            self._metrics.write(line)
            self._tracker.log(line)
            self._console.report(line, seconds_left)

    def advance(self, step: int) -> None:
        """A step that is not."""
        if not self._silent:
            self._console.advance(step)

    def ended(self, exit_code: int) -> None:
        """How the run ended, for W&B; where nobody says, it failed."""
        self._exit_code = exit_code
