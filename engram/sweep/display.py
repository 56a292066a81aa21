"""What a driver shows while it works: bars on a terminal, one line for each start and end elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from engram.report.text import counted, duration
from engram.sweep.grid import Run
from engram.sweep.pool import Pool, RunState
from engram.sweep.tail import last_lines
from engram.sweep.worker import Outcome

# Seconds between two looks at how far the running ones are.
_LOOK_SECONDS = 1.0
# Failed runs of which the end of the log is shown, and how much of it.
_LOGS, _LOG_LINES = 5, 5
RETRY = "python -m engram.sweep retry SWEEP.yaml"


class Display:
    """One bar for all runs, and one for each that is being trained."""

    def __init__(self, console: Console, runs: Sequence[Run], pool: Pool) -> None:
        self._console, self._pool = console, pool
        self._total = len(runs)
        states = {run.id: pool.state(run) for run in runs}
        # Runs whose end has been counted.
        self._ended = {name for name, state in states.items() if state.status == "done"}
        # Tokens that are still to be trained, of each run.
        self._left = {
            run.id: (states[run.id].steps - states[run.id].step) * run.config.tokens_per_step
            for run in runs
            if states[run.id].status not in ("done", "failed")
        }
        self._work = sum(self._left.values())
        self._begun, self._next_look = time.monotonic(), 0.0
        whole = Column(no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=whole),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=whole),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("runs", total=self._total, completed=len(self._ended), note="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if len(self._ended) == self._total:
            self.say(
                "nothing to do: " + ("the run is done" if self._total == 1 else f"all {self._total} runs are done")
            )
        elif self._ended:
            self.say(f"{len(self._ended)} of {counted(self._total, 'run')} done already")
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The bars stand for what is going on; what came out of it is said in lines.
        for task in self._bars.task_ids:
            self._bars.update(task, visible=False)
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, run: Run) -> None:
        name = f"{run.id} {run.label}"
        self._tasks[run.id] = self._bars.add_task(name, total=run.config.train.steps, note="starting")
        if not self._console.is_terminal:
            self.say(f"{run.id} ({run.label}): started")

    def ended(self, run: Run, outcome: Outcome, seconds: float | None) -> None:
        """Count a run that was done, failed or stopped, here or (`seconds` None) elsewhere."""
        if run.id in self._tasks:
            self._bars.remove_task(self._tasks.pop(run.id))
        if outcome.status in ("done", "failed"):
            self._ended.add(run.id)
            left = self._left.pop(run.id, 0)
            # What failed was not trained, and says nothing of the pace.
            self._work -= left if outcome.status == "failed" else 0
        self._bars.update(self._all, completed=len(self._ended))
        loss = self._pool.state(run).val_loss if outcome.status == "done" else None
        result = "" if loss is None else f"validation loss {loss:.4f}"
        taken = duration(seconds) if seconds is not None else "trained elsewhere" if outcome.status == "done" else ""
        words = ", ".join(word for word in (outcome.status, result, outcome.message, taken) if word)
        self.say(f"[{len(self._ended)}/{self._total}] {run.id} ({run.label}): {words}")

    def update(self, running: Sequence[Run], foreign: Sequence[Run]) -> None:
        """Read how far the running ones are; only where someone is looking, and not more often than they can read."""
        if not self._console.is_terminal or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        for run in running:
            state = self._pool.state(run)
            self._left[run.id] = (state.steps - state.step) * run.config.tokens_per_step
            self._bars.update(self._tasks[run.id], completed=state.step, note=progress_note(state))
        notes = [f"{len(foreign)} trained elsewhere"] if foreign else []
        if (seconds := self._seconds_left()) is not None:
            notes.append(f"about {duration(seconds)} left")
        self._bars.update(self._all, note=", ".join(notes))

    def conclude(self, done: int, failed: Sequence[tuple[Run, str]]) -> None:
        """What came of it: the failed ones with the ends of their logs, how to try them again, and a count."""
        for index, (run, message) in enumerate(failed):
            self.say(f"failed: {run.id} ({run.part}, {run.label}): {message}")
            log = self._pool.log(run)
            if index < _LOGS and (lines := last_lines(log, _LOG_LINES)):
                self.say("  " + lines.replace("\n", "\n  ") + f"\n  all of it: {log}")
        rest = self._total - done - len(failed)
        counts = [f"{done} done", *([f"{len(failed)} failed"] if failed else []), *([f"{rest} to go"] if rest else [])]
        self.say(
            f"{counted(self._total, 'run')}: {', '.join(counts)}; {duration(time.monotonic() - self._begun)} spent"
        )
        if failed:
            self.say(
                f"`{RETRY}` trains the failed ones once more, from their last checkpoints where there are any; first "
                "see to what is said of each above"
            )

    def _seconds_left(self) -> float | None:
        """At the pace since the start, in tokens."""
        left = sum(self._left.values())
        trained = self._work - left
        return left * (time.monotonic() - self._begun) / trained if trained > 0 else None


def progress_note(state: RunState) -> str:
    """Loss, speed and time left of a run, as far as it has written them."""
    if state.loss is None:
        return "starting"
    left = "" if state.seconds_left is None else f"  {duration(state.seconds_left)} left"
    speed = "" if state.tokens_per_second is None else f"  {state.tokens_per_second:,.0f} tok/s"
    return f"loss {state.loss:.4f}{speed}{left}"
