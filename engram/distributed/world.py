"""The ranks of a run: who is here, and errors that all of them learn of.

A launcher (torchrun, `deepspeed`, or Slurm's srun around torchrun) tells each process its place through environment
variables.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from engram.config import UserError

T = TypeVar("T")

# Longest wait for what one rank does while others have nothing to do: preparing a corpus, writing tables of terabytes.
# A rank that is gone is noticed at once even so, by its closed connections.
PATIENCE = timedelta(hours=24)
# Seconds of waiting for ranks to start, after which it is said.
TOLD_AFTER = 20.0


class RankError(UserError):
    """Another rank cannot go on, or ranks do not fit together."""

    of_another_rank = True


@dataclass(frozen=True)
class World:
    """This process's place among the ranks; collectives over all of them. `size` 1 communicates with nobody."""

    rank: int
    size: int
    # Where tensors lie that this rank sends and receives.
    device: torch.device
    # For what may keep others waiting: gloo, with PATIENCE. Messages of training steps have the default group.
    patient: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once: logs, metrics, the run folder."""
        return self.rank == 0

    @property
    def here(self) -> range:
        """The ranks of this machine, this one among them; launchers number them one after the other."""
        if self.size == 1:
            return range(self.rank, self.rank + 1)
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value`, in the order of ranks. Small things only: it is pickled. Waits for long work."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.patient)
        return values

    def meet(self) -> None:
        """Wait for all ranks, however long: before messages of steps, after work that takes some of them longer."""
        self.gather(None)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's `tensor`, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails for one rank fails for all: each raises, naming the first rank that failed and why.

        The block must not communicate. A rank's own UserError is raised as it is.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        reasons = self.gather(None if error is None else f"{error}" or type(error).__name__)
        if error is not None:
            raise error
        failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
        if failed:
            rank, reason = failed[0]
            raise RankError(f"rank {rank}: {reason}")

    def first_says(self, make: Callable[[], T]) -> T:
        """What `make`, called on the first rank alone, returns there; where it fails, it fails for all."""
        value: T | None = None
        with self.together():
            if self.is_first:
                value = make()
        return self.gather(value)[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns, called on the first rank before all others, which find what it left behind."""
        value = None
        for turn in (True, False):
            with self.together():
                if self.is_first == turn:
                    value = make()
        return value  # type: ignore[return-value]

    def agree(self, what: str, value: str, advice: str) -> None:
        """Raises RankError, on all ranks, where `value` is not the same everywhere."""
        values = self.gather(value)
        if other := next((rank for rank, each in enumerate(values) if each != values[0]), None):
            raise RankError(f"{what} differs: rank 0 has {values[0]}, rank {other} has {values[other]}: {advice}")


SINGLE = World(rank=0, size=1, device=torch.device("cpu"))


def launched_ranks() -> int:
    """How many ranks the launcher of this process started; 1 where nobody did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _take(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _interruptible(meet: Callable[[], None], size: int) -> None:
    """`meet` on a thread: signals reach Python while it waits for ranks, and who waits for long is told for whom."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            meet()
        except BaseException as error:
            errors.append(error)

    # Whoever is interrupted does not wait for it to end.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TOLD_AFTER)
    if thread.is_alive():
        print(f"rank {os.environ.get('RANK')} waits for the others of {size} ranks to start", file=sys.stderr)
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]


@contextmanager
def join_world(device: torch.device, timeout_seconds: int) -> Iterator[World]:
    """Meet all other ranks; nccl on GPUs, gloo elsewhere. Raises RankError where they cannot be reached.

    A message that waits longer than `timeout_seconds` is a RuntimeError with gloo. With nccl, torch's watchdog says so
    and ends the process itself: an error in Python would take a host that waits for every message.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    # One rank alone needs no launcher, and no address.
    alone: dict[str, Any] = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    size = launched_ranks()

    def meet() -> None:
        _take(device)
        waiting = timedelta(seconds=timeout_seconds)
        distributed.init_process_group(backend, timeout=waiting, **(alone if size == 1 else {}))

    # Each thread has a device of its own.
    _take(device)
    try:
        if size == 1:
            meet()
        else:
            _interruptible(meet, size)
    except (ValueError, RuntimeError) as error:
        reason = str(error).rstrip(". ")
        raise RankError(f"the other ranks cannot be reached: {reason}: start all of them with one torchrun") from error
    try:
        patient = distributed.new_group(timeout=PATIENCE, backend="gloo") if size > 1 else None
        yield World(distributed.get_rank(), size, device, patient)
    finally:
        distributed.destroy_process_group()
