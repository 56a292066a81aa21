"""How all runs of a sweep stand, as a table, as JSON, or live."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engram.report.text import counted, duration
from engram.sweep.grid import Run
from engram.sweep.pool import Pool, RunState

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "damaged": "red",
    "lost": "yellow",
    "pending": "dim",
}
# Seconds between two looks of `--watch`.
WATCH_SECONDS = 2.0


def table(runs: Sequence[Run], pool: Pool) -> Table:
    """One line for each run."""
    return _table(runs, [pool.state(run) for run in runs])


def summary(runs: Sequence[Run], pool: Pool) -> str:
    """`27 runs: 20 done, 2 running, 5 pending; about 0:41:10 left`."""
    return _summary(runs, [pool.state(run) for run in runs])


def as_json(runs: Sequence[Run], pool: Pool) -> Iterator[dict[str, Any]]:
    """One plain object for each run."""
    for run in runs:
        yield {
            "id": run.id,
            "part": run.part,
            "point": run.point,
            "seed": run.seed,
            "run_dir": run.config.run_dir,
            **asdict(pool.state(run)),
        }


def watch(runs: Sequence[Run], pool: Pool, console: Console | None = None) -> None:
    """Show what is not done yet, until nothing is left or Ctrl-C."""
    done: dict[str, RunState] = {}
    with Live(console=console or Console(), auto_refresh=False) as live:
        while True:
            # What is done stays so: it is read once.
            states = [done.get(run.id) or pool.state(run) for run in runs]
            done = {run.id: state for run, state in zip(runs, states, strict=True) if state.status == "done"}
            # Those that need a look first; a screen has no room for all.
            open_ones = [pair for pair in zip(runs, states, strict=True) if pair[1].status != "done"]
            open_ones.sort(key=lambda pair: list(_COLOURS).index(pair[1].status))
            room = max(5, live.console.height - 6)
            shown = [list(column) for column in zip(*open_ones[:room], strict=True)] or [[], []]
            live.update(Group(_table(*shown), Text(_summary(runs, states))), refresh=True)
            if not open_ones or all(state.status in ("failed", "damaged") for _, state in open_ones):
                return
            time.sleep(WATCH_SECONDS)


def _table(runs: Sequence[Run], states: Sequence[RunState]) -> Table:
    lines = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("id", "part", "point", "status"):
        lines.add_column(name)
    for name in ("step", "loss", "val loss", "tokens/s", "left"):
        lines.add_column(name, justify="right")
    lines.add_column("")
    for run, state in zip(runs, states, strict=True):
        running = state.status == "running"
        lines.add_row(
            run.id,
            Text(run.part),
            Text(run.label),
            Text(state.status, style=_COLOURS[state.status]),
            f"{state.step}/{state.steps}",
            _number(state.loss, ".4f"),
            _number(state.val_loss, ".4f"),
            _number(state.tokens_per_second, ",.0f"),
            duration(state.seconds_left) if running and state.seconds_left is not None else "",
            Text(state.message.splitlines()[-1] if state.message else ""),
        )
    return lines


def _summary(runs: Sequence[Run], states: Sequence[RunState]) -> str:
    counts = Counter[str](state.status for state in states)
    parts = ", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status])
    left = _seconds_left(runs, states)
    return f"{counted(len(runs), 'run')}: {parts}" + (f"; about {duration(left)} left" if left else "")


def _seconds_left(runs: Sequence[Run], states: Sequence[RunState]) -> float | None:
    """Time for what is running and pending, at the speed and with the number of trainings of this moment."""
    speeds = [state.tokens_per_second for state in states if state.status == "running" and state.tokens_per_second]
    if not speeds:
        return None
    tokens = sum(
        (state.steps - state.step) * run.config.tokens_per_step
        for run, state in zip(runs, states, strict=True)
        if state.status in ("running", "pending", "lost")
    )
    return tokens / (statistics.mean(speeds) * len(speeds))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
