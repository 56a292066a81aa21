import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.data.errors import DataError
from engram.data.packing import WindowOrder, pack
from engram.data.shards import Dataset
from tests.data.conftest import FolderMaker
from tests.data.test_shards import documents

# No number of tokens divides by any other here.
LENGTH = 13


def pack_by_loops(train: list[list[int]], start: int, length: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and document ids of one window, token by token."""
    stream = [(token, number) for number, document in enumerate(train) for token in [*document, 2]]
    tokens, targets, document_ids = [], [], []
    for position in range(start, start + length):
        token, document = stream[position]
        next_token, next_document = stream[position + 1]
        tokens.append(token)
        targets.append(next_token if next_document == document else -100)
        if position == start:
            document_ids.append(0)
        else:
            document_ids.append(document_ids[-1] + int(document != stream[position - 1][1]))
    return tokens, targets, document_ids


@pytest.mark.parametrize("shard_tokens", [37, 10_000])
def test_pack_against_loops(make_folder: FolderMaker, shard_tokens: int) -> None:
    train = documents(60, 12)
    dataset = Dataset(make_folder(train, shard_tokens=shard_tokens), "train")
    starts = np.arange(dataset.num_tokens - LENGTH)
    tokens, targets, document_ids = pack(dataset, starts, LENGTH)
    for start in starts:
        expected = pack_by_loops(train, int(start), LENGTH)
        assert (tokens[start].tolist(), targets[start].tolist(), document_ids[start].tolist()) == expected


def test_pack_by_hand(make_folder: FolderMaker) -> None:
    dataset = Dataset(make_folder([[5, 6], [], [7, 8, 9]]), "train")
    tokens, targets, document_ids = pack(dataset, np.array([1]), 6)
    assert tokens.tolist() == [[6, 2, 2, 7, 8, 9]]
    assert targets.tolist() == [[2, -100, -100, 8, 9, 2]]
    assert document_ids.tolist() == [[0, 0, 1, 2, 2, 2]]


@given(length=st.integers(2, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_epoch_visits_each_window_once(dataset: Dataset, length: int, seed: int, epoch: int) -> None:
    order = WindowOrder(dataset, length, seed)
    starts = np.sort(order.starts(epoch * order.windows_per_epoch, order.windows_per_epoch))
    assert (np.diff(starts) == length).all()
    assert 0 <= starts[0] < length
    # The last target is inside, and what an epoch leaves out is less than two windows.
    assert starts[-1] + length < dataset.num_tokens
    assert dataset.num_tokens - order.windows_per_epoch * length < 2 * length


@given(first=st.integers(0, 300), count=st.integers(1, 200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_stream_can_be_entered_anywhere(dataset: Dataset, first: int, count: int) -> None:
    whole = WindowOrder(dataset, LENGTH, 7).starts(0, first + count)
    assert WindowOrder(dataset, LENGTH, 7).starts(first, count).tolist() == whole[first:].tolist()


def test_epochs_and_seeds_differ(dataset: Dataset) -> None:
    order, other = WindowOrder(dataset, LENGTH, 0), WindowOrder(dataset, LENGTH, 1)
    count = order.windows_per_epoch
    epochs = [order.starts(epoch * count, count) for epoch in range(8)]
    places = [(epoch // LENGTH).tolist() for epoch in epochs]
    assert all(first != second for first, second in zip(places, places[1:], strict=False))
    assert len({int(epoch.min()) for epoch in epochs}) > 2
    assert other.starts(0, count).tolist() != epochs[0].tolist()


def test_order_is_pinned(dataset: Dataset) -> None:
    # Drawn from raw bits of PCG64, which numpy keeps for ever: a run repeats with any version of numpy.
    order = WindowOrder(dataset, 64, 3)
    bits = np.random.PCG64(np.random.SeedSequence((3, 0)))
    offset = int(bits.random_raw()) % min(64, dataset.num_tokens - order.windows_per_epoch * 64)
    keys = [int(bits.random_raw()) for _ in range(order.windows_per_epoch)]
    expected = [offset + 64 * place for place in sorted(range(len(keys)), key=keys.__getitem__)]
    assert order.starts(0, order.windows_per_epoch).tolist() == expected


@pytest.mark.parametrize(("tokens", "windows"), [(14, 1), (25, 1), (26, 1), (38, 1), (39, 2)])
def test_smallest_splits(make_folder: FolderMaker, tokens: int, windows: int) -> None:
    order = WindowOrder(Dataset(make_folder([[5] * (tokens - 1)]), "train"), LENGTH, 0)
    assert order.windows_per_epoch == windows
    starts = order.starts(0, 50)
    assert starts.min() >= 0 and starts.max() + LENGTH < tokens
    assert len(set(starts.tolist())) > 1 or tokens == LENGTH + 1


def test_less_than_one_sequence(make_folder: FolderMaker) -> None:
    dataset = Dataset(make_folder([[5] * (LENGTH - 1)]), "train")
    with pytest.raises(DataError, match=r"train split has 13 tokens, but .* data\.sequence_length 13 needs 14"):
        WindowOrder(dataset, LENGTH, 0)


@pytest.fixture
def dataset(make_folder: FolderMaker) -> Dataset:
    return Dataset(make_folder(documents(80, 30), shard_tokens=300), "train")
