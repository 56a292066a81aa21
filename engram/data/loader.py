"""Batches for training and validation: the same for any number of ranks, resumable at any batch."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from engram.data.errors import DataError
from engram.data.packing import WindowOrder, check_length, pack
from engram.data.shards import Dataset


class Batch(NamedTuple):
    """Each int64 [batch / world_size, sequence_length]; see `packing.pack`."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Loader:
    """Endless training batches. Batch b holds the windows b B to (b + 1) B - 1 of `WindowOrder`, a rank its equal part.

    The ranks' parts, one below the other, are the same global batch for any world size. `prefetch` batches are made
    ahead by a thread; 0 makes them in line. Raises DataError where `batch_size` cannot be shared out, or where the
    split holds less than one sequence. `batches_per_epoch` need not be whole: batches span the borders of epochs.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        batch_size: int,
        shuffle_seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        if batch_size % world_size:
            raise DataError(
                f"train.batch_size {batch_size} cannot be shared equally by {world_size} ranks: "
                f"make it a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} does not exist: with {world_size} ranks they are 0 to {world_size - 1}")
        order = WindowOrder(dataset, sequence_length, shuffle_seed)
        share = batch_size // world_size

        # A closure over the order alone: a worker that held the loader would keep it from being collected.
        def make(batch: int) -> Batch:
            starts = order.starts(batch * batch_size + rank * share, share)
            return _to_torch(pack(dataset, starts, sequence_length))

        self.batches_per_epoch = order.windows_per_epoch / batch_size
        self._make = make
        self._prefetch = prefetch
        self._next = 0
        self._worker: _Prefetcher | None = None
        self._ahead: Batch | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch, self._ahead = self.peek(), None
        self._next += 1
        return batch

    def peek(self) -> Batch:
        """The batch that comes next, which stays the next."""
        if self._ahead is None:
            self._ahead = self._get()
        return self._ahead

    def _get(self) -> Batch:
        if not self._prefetch:
            return self._make(self._next)
        self._worker = self._worker or _Prefetcher(self._make, self._next, self._prefetch)
        try:
            return self._worker.get()
        except BaseException:
            self.close()
            raise

    def state_dict(self) -> dict[str, int]:
        """Number of the batch that comes next; batches made ahead do not count."""
        return {"batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self._next = state["batch"]

    def close(self) -> None:
        """Stop the thread. The loader can be used again: it goes on with the batch that comes next."""
        self._ahead = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Python calls this also where __init__ raised.
        if getattr(self, "_worker", None) is not None:
            self.close()


class _Prefetcher:
    """A thread that makes batches ahead, in order; its errors are raised where the batch is asked for."""

    def __init__(self, make: Callable[[int], Batch], first: int, depth: int) -> None:
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        arguments = (make, first, self._ready, self._stop)
        self._thread = threading.Thread(target=self._work, args=arguments, name="batch prefetch", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        result = self._ready.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._stop.set()
        # The thread may be waiting for a free place in the queue.
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)

    @staticmethod
    def _work(make: Callable[[int], Batch], batch: int, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                ready.put(make(batch))
                batch += 1
        except BaseException as error:
            ready.put(error)


def validation_batches(
    dataset: Dataset, sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The split's windows in order from its start, up to `max_tokens` (null: all); the last batch may be smaller.

    The windows do not depend on `batch_size`. Raises DataError where not even one sequence fits.
    """
    check_length(dataset, sequence_length)
    windows = (dataset.num_tokens - 1) // sequence_length
    if max_tokens is not None:
        windows = min(windows, max_tokens // sequence_length)
    if not windows:
        raise DataError(
            f"eval.tokens is {max_tokens:,}, less than one sequence of data.sequence_length {sequence_length:,}: "
            "raise it"
        )
    starts = np.arange(windows) * sequence_length
    return (
        _to_torch(pack(dataset, starts[first : first + batch_size], sequence_length))
        for first in range(0, windows, batch_size)
    )


def _to_torch(arrays: tuple[NDArray[np.int64], ...]) -> Batch:
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
