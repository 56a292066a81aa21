"""When a run's checkpoints are written: while training waits, or beside it."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engram.distributed.world import World
from engram.training.checkpoint_files import (
    Contents,
    FolderWriter,
    point_to,
    remove_older,
    save_step,
    step_folder,
)


@dataclass
class CheckpointSaver:
    """Saves checkpoints of `run_dir`, and keeps the newest `keep`; every method is called on all ranks alike.

    `beside_training`: only the copying of weights and optimizer state into host memory, where they take their size once
    more, holds training up; a thread writes the copies, and then deletes older checkpoints. A checkpoint counts from
    the first `poll` on that finds all ranks ready, or from the end of the run.
    """

    run_dir: Path
    keep: int
    world: World
    beside_training: bool = False
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _pending: tuple[FolderWriter, Future[None]] | None = None
    _removing: Future[None] | None = None
    # Filled anew by every checkpoint: memory that was never used costs more than the copying.
    _copies: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def save(self, step: int, contents: Contents) -> None:
        """Save, or begin to. Raises CheckpointError: the disk does not take this checkpoint, or the one before."""
        if not self.beside_training:
            save_step(self.run_dir, step, contents, self.keep, self.world)
            return
        self.wait()
        writer = FolderWriter(
            step_folder(self.run_dir, step), replace(contents, tensors=self._copied(contents)), self.world
        )
        writer.begin()
        self._pending = writer, self._threads.submit(writer.write)

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of what was begun."""
        return self._pending is None or self._pending[1].done()

    def poll(self) -> None:
        """Complete what all ranks have written. Raises CheckpointError: the disk did not take it."""
        if self._pending is not None and not self.world.any(not self.ready):
            self.wait()

    def wait(self) -> None:
        """Complete what is being written. Raises CheckpointError: the disk did not take it."""
        if self._pending is None:
            return
        writer, writing = self._pending
        self._pending = None
        writing.result()
        writer.complete()
        point_to(writer.folder, self.world)
        with self.world.together():
            self._finish_removing()
        if self.world.is_first:
            self._removing = self._threads.submit(remove_older, writer.folder, self.keep)

    def _finish_removing(self) -> None:
        """Raises OSError: what was older could not be deleted."""
        if self._removing is not None:
            removing, self._removing = self._removing, None
            removing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Where this rank failed, others may be gone: what they would have to complete together, the next start
            # clears away.
            if error is None or self.world.size == 1:
                self.wait()
                with self.world.together():
                    self._finish_removing()
        finally:
            self._threads.shutdown()

    def _copied(
        self, contents: Contents
    ) -> Mapping[str, Mapping[str, Tensor]] | Iterable[tuple[str, Mapping[str, Tensor]]]:
        if not isinstance(contents.tensors, Mapping):
            # Made for this checkpoint.
            return list(contents.tensors)
        copies = {
            file: {name: self._copy(file, name, tensor.detach()) for name, tensor in tensors.items()}
            for file, tensors in contents.tensors.items()
        }
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copies

    def _copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get((file, name))
        if copy is None or copy.shape != tensor.shape:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[file, name] = copy
        return copy.copy_(tensor, non_blocking=True)
