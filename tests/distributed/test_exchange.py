"""Rows on their way between ranks, against loops over who asks whom; bytes counted one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.distributed.exchange import RowExchange
from engram.distributed.world import World
from tests.distributed.ranks import run_ranks, values

RANKS, WIDTH = 3, 2
# Equal shares; far more rows than 32 bits number; an owner without rows; one owner of all.
RANGES = [
    [range(7), range(7, 14), range(14, 20)],
    [range(5), range(5, 2**32), range(2**32, 2**33)],
    [range(4), range(4, 4), range(4, 9)],
    [range(6), range(6, 6), range(6, 6)],
]
# Ids that each rank asks for, by table.
Wanted = list[list[list[int]]]
CASES: dict[str, Wanted] = {
    "all of them": [[list(range(20)), [0, 4, 5, 2**31, 2**32 - 1, 2**32, 2**33 - 1], list(range(9)), [5]]] * RANKS,
    "some": [
        [[0, 13, 19], [2**32 + 3], [], [0, 1]],
        [[7], [4, 2**31 + 1], [3, 4], []],
        [[2, 3, 8, 14], [], [0, 8], [1, 5]],
    ],
    "one rank asks for nothing": [[[1, 8], [9], [0], [0]], [[], [], [], []], [[1], [2**33 - 1], [8], [4]]],
    "nothing": [[[], [], [], []]] * RANKS,
}


def row(number: int, table: int) -> list[float]:
    """Exact in bfloat16."""
    return [float(number % 127), float(number // 2**26 + table)]


def gradient(number: int, table: int, rank: int) -> list[float]:
    return [float(number % 101 + 128 * rank), number / 2**40 + table]


def rows_of(ids: Tensor, table: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([row(each, table) for each in ids.tolist()], dtype=dtype).view(-1, WIDTH)


def travel(world: World, exchange: RowExchange, wanted: Sequence[list[int]], dtype: torch.dtype) -> dict[str, Any]:
    """One step's ids, rows and gradients."""
    answer = exchange.ask([torch.tensor(ids, dtype=torch.int64) for ids in wanted], True)
    assert answer is not None
    asked, reads = answer
    arriving = exchange.answer(asked, [rows_of(ids, table, dtype) for table, ids in enumerate(reads)])
    # The last is waited for first, and one of them twice.
    arrived = [wait() for wait in reversed(arriving)][::-1]
    assert torch.equal(arriving[1](), arrived[1])
    gradients = [
        torch.tensor([gradient(each, table, world.rank) for each in ids]).view(-1, WIDTH)
        for table, ids in enumerate(wanted)
    ]
    returned = exchange.return_gradients(asked, gradients)
    return {
        "reads": [each.tolist() for each in reads],
        "arrived": arrived,
        "returned": returned,
        "sent": asked.bytes_sent,
        "counts": asked.bytes_of_counts,
    }


def travel_all(world: World) -> dict[tuple[str, torch.dtype], dict[str, Any]]:
    exchange = RowExchange(world, RANGES)
    return {
        (name, dtype): travel(world, exchange, wanted[world.rank], dtype)
        for name, wanted in CASES.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


def bytes_to_others(wanted: Wanted, rank: int, row_bytes: int) -> int:
    """8 for an id and 4 WIDTH for its gradient, of each row that somebody else owns; `row_bytes` the other way."""
    total = 0
    for reader in range(RANKS):
        for ranges, ids in zip(RANGES, wanted[reader], strict=True):
            for each in ids:
                [owner] = [place for place, rows in enumerate(ranges) if each in rows]
                total += (owner != reader) * ((reader == rank) * (8 + 4 * WIDTH) + (owner == rank) * row_bytes)
    return total


def test_rows_and_gradients_arrive_where_they_belong(tmp_path: Path) -> None:
    results = values(run_ranks(RANKS, travel_all, folder=tmp_path))
    for (name, dtype), _ in results[0].items():
        wanted = CASES[name]
        for rank, result in enumerate(each[name, dtype] for each in results):
            for table, ranges in enumerate(RANGES):
                ours, own = wanted[rank][table], ranges[rank]
                reads = [(each, reader) for reader in range(RANKS) for each in wanted[reader][table] if each in own]
                assert result["reads"][table] == [each for each, _ in reads]
                assert result["arrived"][table].dtype == dtype
                assert result["arrived"][table].tolist() == [row(each, table) for each in ours]
                expected = torch.tensor([gradient(each, table, reader) for each, reader in reads]).view(-1, WIDTH)
                assert torch.equal(result["returned"][table], expected)
            # A number for each table, and one more, to each of the others.
            assert result["counts"] == (RANKS - 1) * (len(RANGES) + 1) * 8
            assert result["sent"] - result["counts"] == bytes_to_others(wanted, rank, WIDTH * dtype.itemsize)


INVALID = [{1}, {0, 2}]


def refuse(world: World) -> list[tuple[bool, list[list[int]]]]:
    exchange, found = RowExchange(world, RANGES), []
    for ranks in INVALID:
        ids = [torch.tensor(each, dtype=torch.int64) for each in CASES["some"][world.rank]]
        if world.rank in ranks:
            ids[0] = torch.tensor([20, 2**40])
        refused = exchange.ask(ids, world.rank not in ranks) is None
        found.append((refused, travel(world, exchange, CASES["all of them"][world.rank], torch.float32)["reads"]))
    return found


def test_ids_that_are_not_valid_on_some_ranks_are_refused_on_all(tmp_path: Path) -> None:
    for rank, found in enumerate(values(run_ranks(RANKS, refuse, folder=tmp_path))):
        for refused, reads in found:
            assert refused
            # Nothing is left over for the next step.
            assert reads[0] == RANKS * list(RANGES[0][rank])
