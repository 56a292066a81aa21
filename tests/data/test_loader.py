import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from engram.data import loader as loader_module
from engram.data.errors import DataError
from engram.data.loader import Batch, Loader, validation_batches
from engram.data.packing import WindowOrder
from engram.data.shards import Dataset
from tests.data.conftest import FolderMaker
from tests.data.test_packing import pack_by_loops
from tests.data.test_shards import documents

LENGTH, BATCH = 13, 8
TRAIN = documents(90, 30)


@pytest.fixture
def dataset(make_folder: FolderMaker) -> Dataset:
    return Dataset(make_folder(TRAIN, validation=documents(30, 20, seed=1), shard_tokens=300), "train")


def take(loader: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def join(ranks: list[list[Batch]]) -> list[Batch]:
    """Global batches of the ranks' parts."""
    return [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]


def prefetch_threads() -> int:
    return sum(thread.name == "batch prefetch" for thread in threading.enumerate())


def test_batches_against_loops(dataset: Dataset) -> None:
    order = WindowOrder(dataset, LENGTH, 5)
    # More than two epochs, so that batches span their borders.
    for number, batch in enumerate(take(Loader(dataset, LENGTH, BATCH, 5, prefetch=0), 30)):
        for row, start in enumerate(order.starts(number * BATCH, BATCH)):
            expected = pack_by_loops(TRAIN, int(start), LENGTH)
            assert tuple(part[row].tolist() for part in batch) == expected
        assert all(part.dtype == torch.int64 and part.is_contiguous() for part in batch)
    assert 2 * order.windows_per_epoch / BATCH < 30


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_same_global_batches_for_any_world_size(dataset: Dataset, world_size: int, prefetch: int) -> None:
    expected = take(Loader(dataset, LENGTH, BATCH, 1, prefetch=0), 25)
    ranks = [Loader(dataset, LENGTH, BATCH, 1, rank, world_size, prefetch) for rank in range(world_size)]
    parts = [take(rank, 25) for rank in ranks]
    assert same(join(parts), expected)
    assert parts[0][0].tokens.shape == (BATCH // world_size, LENGTH)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("position", [0, 1, 7, 24])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 2), (3, 3)])
def test_resume(dataset: Dataset, position: int, before: int, after: int) -> None:
    expected = take(Loader(dataset, LENGTH, BATCH, 2, prefetch=0), 30)
    with Loader(dataset, LENGTH, BATCH, 2, prefetch=before) as first:
        take(first, position)
        state = first.state_dict()
    assert state == {"batch": position}
    with Loader(dataset, LENGTH, BATCH, 2, prefetch=after) as second:
        take(second, 3)
        second.load_state_dict(state)
        assert same(take(second, 30 - position), expected[position:])


def test_resume_on_other_ranks(dataset: Dataset) -> None:
    expected = take(Loader(dataset, LENGTH, BATCH, 2, prefetch=0), 12)
    with Loader(dataset, LENGTH, BATCH, 2) as alone:
        take(alone, 9)
    ranks = [Loader(dataset, LENGTH, BATCH, 2, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    assert same(join([take(rank, 3) for rank in ranks]), expected[9:])
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_peek_takes_nothing(dataset: Dataset, prefetch: int) -> None:
    expected = take(Loader(dataset, LENGTH, BATCH, 5, prefetch=0), 6)
    with Loader(dataset, LENGTH, BATCH, 5, prefetch=prefetch) as loader:
        for number in range(3):
            assert same([loader.peek()], [expected[number]])
            assert same([loader.peek()], [expected[number]])
            assert loader.state_dict() == {"batch": number}
            assert same([next(loader)], [expected[number]])
        loader.peek()
        loader.load_state_dict({"batch": 1})
        assert same([loader.peek()], [expected[1]])
        assert same(take(loader, 5), expected[1:])


def test_seeds_differ(dataset: Dataset) -> None:
    assert not same(take(Loader(dataset, LENGTH, BATCH, 1), 1), take(Loader(dataset, LENGTH, BATCH, 2), 1))


def test_close_stops_the_thread_and_the_loader_goes_on(dataset: Dataset) -> None:
    expected = take(Loader(dataset, LENGTH, BATCH, 2, prefetch=0), 6)
    loader = Loader(dataset, LENGTH, BATCH, 2, prefetch=1)
    first = take(loader, 3)
    assert prefetch_threads() == 1
    loader.close()
    loader.close()
    assert prefetch_threads() == 0
    assert same(first + take(loader, 3), expected)
    loader.close()


def test_a_forgotten_loader_stops_its_thread(dataset: Dataset) -> None:
    loader = Loader(dataset, LENGTH, BATCH, 2, prefetch=2)
    next(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    assert prefetch_threads() == 0


def test_errors_of_the_thread_arrive(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(*arguments: object) -> tuple[np.ndarray, ...]:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("disk is gone")
        return (np.zeros((1, 1), np.int64),) * 3

    monkeypatch.setattr(loader_module, "pack", failing)
    loader = Loader(dataset, LENGTH, BATCH, 2, prefetch=4)
    take(loader, 2)
    with pytest.raises(OSError, match="disk is gone"):
        next(loader)
    assert prefetch_threads() == 0
    assert loader.state_dict() == {"batch": 2}


def test_prefetch_stays_within_its_depth(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pack = loader_module.pack
    monkeypatch.setattr(loader_module, "pack", lambda *arguments: made.append(1) or pack(*arguments))
    with Loader(dataset, LENGTH, BATCH, 2, prefetch=2) as loader:
        next(loader)
        patience = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(0.1)
        # One handed out, two ready, and one in the thread's hands.
        assert len(made) == 4


def test_batch_to_device(dataset: Dataset) -> None:
    batch = next(Loader(dataset, LENGTH, BATCH, 2, prefetch=0))
    assert {part.device.type for part in batch.to("meta")} == {"meta"}


@pytest.mark.parametrize(
    ("batch_size", "rank", "world_size", "message"),
    [
        (8, 0, 3, r"train\.batch_size 8 cannot be shared equally by 3 ranks: make it a multiple of 3"),
        (8, 2, 2, "rank 2 does not exist"),
    ],
)
def test_impossible_shares(dataset: Dataset, batch_size: int, rank: int, world_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Loader(dataset, LENGTH, batch_size, 0, rank, world_size)


def test_context_longer_than_the_split(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"data\.sequence_length 5,000 needs 5,001: shorten it"):
        Loader(dataset, 5000, BATCH, 0)
    with pytest.raises(DataError, match=r"data\.sequence_length 5,000 needs 5,001: shorten it"):
        validation_batches(dataset, 5000, BATCH)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
@pytest.mark.parametrize("max_tokens", [None, 100, 13])
def test_validation_windows_do_not_depend_on_the_batch_size(
    dataset: Dataset, batch_size: int, max_tokens: int | None
) -> None:
    batches = list(validation_batches(dataset, LENGTH, batch_size, max_tokens))
    windows = (dataset.num_tokens - 1) // LENGTH if max_tokens is None else max_tokens // LENGTH
    assert [len(batch.tokens) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    tokens, targets, document_ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for row, start in enumerate(range(0, windows * LENGTH, LENGTH)):
        expected = pack_by_loops(TRAIN, start, LENGTH)
        assert (tokens[row].tolist(), targets[row].tolist(), document_ids[row].tolist()) == expected
    assert len(tokens) == windows


def test_too_few_validation_tokens(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"eval\.tokens is 12, less than one sequence of data\.sequence_length 13"):
        validation_batches(dataset, LENGTH, BATCH, 12)
