"""Several processes that evaluate one model together: `torchrun --nproc-per-node N -m eval ...`.

Every process holds the whole model and reads the same requests; each scores its part, and all get every score.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@contextmanager
def together() -> Iterator[int]:
    """Inside the context the processes that torchrun started know each other; yields this one's rank, 0 if alone."""
    if "RANK" not in os.environ or distributed.is_initialized():
        yield world()[0]
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Only scores travel between processes, as Python objects: there is nothing for NCCL to do.
    # Who has less to do waits, however long; a process that is gone is noticed at once even so.
    distributed.init_process_group("gloo", timeout=timedelta(hours=24))
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def own_part(costs: Sequence[int]) -> range:
    """The neighbouring places that this process works on, such that all processes' costs are about equal."""
    rank, size = world()
    bounds, done, total = [0], 0, sum(costs)
    for place, cost in enumerate(costs):
        # A place belongs to the process in whose share its middle falls.
        while len(bounds) < size and (done + cost / 2) * size >= total * len(bounds):
            bounds.append(place)
        done += cost
    bounds += [len(costs)] * (size + 1 - len(bounds))
    return range(bounds[rank], bounds[rank + 1])


def merged(found: dict[int, T]) -> dict[int, T]:
    """What all processes found."""
    size = world()[1]
    if size == 1:
        return found
    parts: list[dict[int, T]] = [{} for _ in range(size)]
    distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def shared(value: T) -> T:
    """What the first process holds."""
    if world()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]
