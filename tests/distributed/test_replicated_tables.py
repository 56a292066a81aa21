"""Gradients of replicated tables against the sum of everybody's dense gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engram.distributed.replicated_tables import sum_table_gradients
from engram.distributed.world import World
from tests.distributed.ranks import run_ranks, values

ROWS, WIDTH = 29, 3


def reads(rank: int, table: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows that a rank read, some twice and some dead, and their gradients."""
    generator = torch.Generator().manual_seed(10 * rank + table)
    ids = torch.randint(-1, ROWS, (count,), generator=generator)
    return ids, torch.randn(count, WIDTH, generator=generator)


def dense(ids: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros(ROWS, WIDTH)
    for row, gradient in zip(ids.tolist(), gradients, strict=True):
        if row >= 0:
            total[row] += gradient
    return total


def summed(world: World, counts: list[int], as_dense: bool) -> list[tuple[Tensor, bool]]:
    tables = [nn.Parameter(torch.zeros(ROWS, WIDTH)) for _ in range(2)]
    for number, table in enumerate(tables):
        ids, gradients = reads(world.rank, number, counts[world.rank])
        sparse = torch.sparse_coo_tensor(ids[None], gradients, table.shape, check_invariants=False)
        table.grad = dense(ids, gradients) if as_dense else sparse
    sum_table_gradients(tables, world)
    return [(table.grad.to_dense(), table.grad.is_sparse and table.grad.is_coalesced()) for table in tables]


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("counts", [[7, 40, 13], [0, 5, 0], [1, 1, 1]])
def test_every_rank_has_the_sum(tmp_path: Path, counts: list[int], as_dense: bool) -> None:
    results = values(run_ranks(3, summed, counts, as_dense, folder=tmp_path))
    for number in range(2):
        expected = sum(dense(*reads(rank, number, count)) for rank, count in enumerate(counts))
        for result in results:
            gradient, coalesced = result[number]
            torch.testing.assert_close(gradient, expected)
            assert torch.equal(gradient, results[0][number][0])
            assert coalesced is not as_dense
