"""What people read: log.txt, and a progress bar, or plain lines where stderr is not a terminal."""

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engram.report.text import duration

logger = logging.getLogger(__name__)

# logger.info(..., extra=LOG_FILE_ONLY): what would be too long or too much for the terminal.
LOG_FILE_ONLY = {"log_file_only": True}


class LogFile(logging.FileHandler):
    """log.txt; where the disk takes no more, lines are lost without a word: whatever else is written says why."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class RunConsole:
    """Logging of one run while the `with` block lasts: everything to log.txt and to stderr.

    Of several ranks, all but the first show errors alone, with their number.
    """

    def __init__(self, log_file: Path, steps: int, rank: int = 0) -> None:
        self._steps = steps
        self.terminal = Console(stderr=True, quiet=rank > 0)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, metrics="")
        self._val_loss: float | None = None
        self._handlers = [_file_handler(log_file), self._console_handler()] if rank == 0 else [_errors_of(rank)]

    def __enter__(self) -> Self:
        root = logging.getLogger("engram")
        self._level = root.level
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        for handler in self._handlers:
            root.addHandler(handler)
            logging.getLogger("py.warnings").addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        root = logging.getLogger("engram")
        root.setLevel(self._level)
        logging.captureWarnings(False)
        for handler in self._handlers:
            root.removeHandler(handler)
            logging.getLogger("py.warnings").removeHandler(handler)
            handler.close()

    def start(self, step: int) -> None:
        """Show the bar, standing at `step`."""
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def report(self, metrics: dict[str, Any], seconds_left: float) -> None:
        """Show one line of metrics: in log.txt always, on stderr beside the bar or as a plain line."""
        step, val_loss = metrics["step"], metrics.get("val_loss")
        self._val_loss = self._val_loss if val_loss is None else val_loss
        loss, speed = f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, metrics=f"{loss}  {_validation(self._val_loss)}{speed}")
        rest = f"lr {metrics['lr']:.3g}  grad norm {metrics['grad_norm']:.3f}  {duration(seconds_left)} left"
        line = f"step {step}/{self._steps}  {loss}  {_validation(val_loss)}{speed}  {rest}"
        logger.info(line, extra=LOG_FILE_ONLY if self.terminal.is_terminal else None)

    def _console_handler(self) -> logging.Handler:
        if self.terminal.is_terminal:
            handler: logging.Handler = RichHandler(
                console=self.terminal, show_path=False, show_time=False, highlighter=NullHighlighter()
            )
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(lambda record: not getattr(record, "log_file_only", False))
        return handler


def _errors_of(rank: int) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    handler.addFilter(lambda record: not getattr(record, "log_file_only", False))
    return handler


def _file_handler(path: Path) -> logging.Handler:
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _validation(loss: float | None) -> str:
    return "" if loss is None else f"val {loss:.4f}  "
