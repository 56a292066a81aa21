"""A run's folder, held by the first of its ranks: what that rank reads of it and is told by it, all ranks know."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engram.config import Config
from engram.distributed.world import World
from engram.training.run_folder import RunFolder


class SharedFolder:
    """`RunFolder` for several ranks: every method is called on all of them, and fails on all where it fails."""

    def __init__(self, config: Config, world: World) -> None:
        self._own = RunFolder(config)
        self._world = world
        self.path: Path = self._own.path

    def __enter__(self) -> Self:
        self._world.first_says(lambda: bool(self._own.__enter__()))
        self.leftovers, self.rounding_changes = self._world.first_says(
            lambda: (self._own.leftovers, self._own.rounding_changes)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._own.__exit__(kind, error, traceback)

    @property
    def finished_note(self) -> str | None:
        return self._world.first_says(lambda: self._own.finished_note)

    def start(self, facts: dict[str, Any]) -> str:
        return self._world.first_says(lambda: self._own.start(facts))

    def finish(self, summary: dict[str, Any]) -> None:
        self._world.first_says(lambda: self._own.finish(summary))
