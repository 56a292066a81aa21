"""Progress of long work, shown on a console or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Bars and lines on a console; None: silence."""

    def __init__(self, console: "Console | None" = None) -> None:
        self._console = console

    def say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar over bytes; yields the function that advances it. `total` None: not known beforehand."""
        if self._console is None:
            yield lambda amount: None
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:<28}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=self._console) as bars:
            task = bars.add_task(description, total=total)
            yield lambda amount: bars.advance(task, amount)
            done = bars.tasks[task].completed
            bars.update(task, total=done, completed=done)
