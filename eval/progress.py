"""A bar for each long measurement."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields what starts a bar of a name and a total, and returns its advance; nothing shows off a terminal."""
    shown = (TextColumn("{task.description:<24}"), BarColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bars:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=total)
            return lambda amount: bars.advance(task, amount)

        yield begin
