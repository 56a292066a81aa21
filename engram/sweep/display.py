"""What a driver shows while it works: bars on a terminal, one line for each start and end elsewhere."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engram.report.text import duration
from engram.sweep.grid import Run
from engram.sweep.pool import Pool, RunState
from engram.sweep.worker import Outcome


class Display:
    """One bar for all runs, and one for each that is being trained."""

    def __init__(self, console: Console, runs: Sequence[Run], pool: Pool) -> None:
        self._console, self._pool = console, pool
        self._total = len(runs)
        # Runs whose end has been counted.
        self._ended = {run.id for run in runs if pool.state(run).status == "done"}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("runs", total=self._total, completed=len(self._ended), note="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if len(self._ended) == self._total:
            self.say(f"all {self._total} runs are done: nothing to do")
        elif self._ended:
            self.say(f"{len(self._ended)} of {self._total} runs are done already")
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, run: Run) -> None:
        self._tasks[run.id] = self._bars.add_task(run.label, total=run.config.train.steps, note="starting")
        if not self._console.is_terminal:
            self.say(f"{run.id} ({run.label}): started")

    def ended(self, run: Run, outcome: Outcome, taken: str) -> None:
        if run.id in self._tasks:
            self._bars.remove_task(self._tasks.pop(run.id))
        if outcome.status in ("done", "failed"):
            self._ended.add(run.id)
        self._bars.update(self._all, completed=len(self._ended))
        loss = self._pool.state(run).val_loss
        result = f"validation loss {loss:.4f}" if outcome.status == "done" and loss is not None else outcome.message
        self.say(f"[{len(self._ended)}/{self._total}] {run.id} ({run.label}): {outcome.status}, {result}, {taken}")

    def update(self, running: Sequence[Run], foreign: Sequence[Run]) -> None:
        """Read how far the running ones are; only where someone is looking."""
        if not self._console.is_terminal:
            return
        for run in running:
            state = self._pool.state(run)
            self._bars.update(self._tasks[run.id], completed=state.step, note=progress_note(state))
        self._bars.update(self._all, note=f"{len(foreign)} trained elsewhere" if foreign else "")


def progress_note(state: RunState) -> str:
    """Loss, speed and time left of a run, as far as it has written them."""
    if state.loss is None:
        return "starting"
    left = "" if state.seconds_left is None else f"  {duration(state.seconds_left)} left"
    speed = "" if state.tokens_per_second is None else f"  {state.tokens_per_second:,.0f} tokens/s"
    return f"loss {state.loss:.4f}{speed}{left}"
