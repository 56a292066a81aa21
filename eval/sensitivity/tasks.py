"""The suites of tasks that `python -m eval sensitivity` can ask, by name."""

import difflib
from collections.abc import Sequence

from engram.config import UserError
from eval.facts.score import facts_suite
from eval.loading import Loaded
from eval.sensitivity.retained import Suite

# The loss is no suite of items: it has a table of its own.
TASKS = ("loss", "facts")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise UserError for an unknown name, or for none at all."""
    for task in tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise UserError(f"there is no task {task!r}{hint} (tasks: {', '.join(TASKS)})")
    if not tasks:
        raise UserError(f"no task was named: choose with --tasks among {', '.join(TASKS)}")


def build_suites(tasks: Sequence[str], loaded: Loaded, benchmarks: Suite | None = None) -> dict[str, Suite]:
    """The suites among `tasks`, for this checkpoint, and that of a file. Raises UserError where it cannot be asked."""
    builders = {"facts": facts_suite}
    found = {task: builders[task](loaded) for task in tasks if task in builders}
    return found if benchmarks is None else found | {benchmarks.name: benchmarks}
