"""Tables of which a batch's rows are staged, against a whole table: the same rows, the same gradient, nothing else."""

import pytest
import torch
from torch import Tensor

from engram.memory.staged_table import StagedTable, StagedTables
from engram.memory.table import RowTable
from engram.optim.sparse import coalesce

ROWS, WIDTH = 30, 4


def pair() -> tuple[StagedTable, StagedTables, RowTable]:
    whole = RowTable(ROWS, WIDTH, init_std=1.0)
    owner = RowTable(ROWS, WIDTH)
    with torch.no_grad():
        owner.weight.copy_(whole.weight)
    table = StagedTable(owner, ROWS)
    return table, StagedTables({3: table}), whole


def some_ids(*shape: int) -> Tensor:
    return torch.randint(-1, ROWS, shape)


@pytest.mark.parametrize("dense", [False, True])
def test_rows_and_gradients_are_those_of_a_whole_table(dense: bool) -> None:
    table, steps, whole = pair()
    table.dense_gradients = whole.dense_gradients = dense
    for _ in range(2):
        ids = some_ids(4, 5, 3)
        steps.begin({3: ids})
        for part in ids.split(2):
            # Dyadic factors: no sum is rounded, in whatever order.
            factors = torch.randint(-8, 9, (2, 5, 3 * WIDTH)) / 8
            rows, expected = table(part, torch.float32), whole(part, torch.float32)
            assert torch.equal(rows, expected)
            (rows * factors).sum().backward()
            (expected * factors).sum().backward()
        assert table.weight.grad is None
        steps.finish()
        ours, theirs = table.weight.grad, whole.weight.grad
        assert ours is not None and theirs is not None
        assert ours.is_sparse is not dense
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        if not dense:
            assert ours.is_coalesced() and torch.equal(ours._indices(), coalesce(theirs)._indices())
        table.weight.grad = whole.weight.grad = None
        steps.updated()


def test_gradients_of_bfloat16_tables_are_summed_in_float32() -> None:
    owner = RowTable(2, 1, init_std=1.0, dtype=torch.bfloat16)
    owner.weight.grad_dtype = torch.float32
    table = StagedTable(owner, 2)
    steps = StagedTables({0: table})
    ids = torch.zeros(1, 300, 1, dtype=torch.int64)
    steps.begin({0: ids})
    # Bfloat16 would round the factor to 1, and counts to 256.
    (table(ids, torch.float32) * (1 + 2**-10)).sum().backward()
    steps.finish()
    assert owner.weight.grad is not None
    assert owner.weight.grad.to_dense().tolist() == [[300 * (1 + 2**-10)], [0.0]]


def test_what_was_not_read_has_no_gradient() -> None:
    table, steps, _ = pair()
    steps.begin({3: torch.tensor([[[7, 2]]])})
    steps.finish()
    gradient = table.weight.grad
    assert gradient is not None and gradient._indices().tolist() == [[2, 7]] and not gradient._values().any()


def test_dead_ids_read_zeros() -> None:
    table, steps, whole = pair()
    steps.begin({3: torch.full((1, 2, 3), -1)})
    assert torch.equal(table(torch.full((1, 2, 3), -1), torch.bfloat16), torch.zeros(1, 2, 12, dtype=torch.bfloat16))
    steps.begin({3: torch.tensor([[[-1, 4, -1]]])})
    rows = table(torch.tensor([[[-1, 4, -1]]]), torch.float32)[0, 0]
    assert torch.equal(rows, torch.cat([torch.zeros(4), whole.weight[4], torch.zeros(4)]))


@pytest.mark.parametrize("wrong", [3, 9, 29])
def test_a_row_that_was_not_staged(wrong: int) -> None:
    table, steps, _ = pair()
    steps.begin({3: torch.tensor([[[4, 8]]])})
    with pytest.raises(RuntimeError, match="a row was read that was not staged"):
        table(torch.tensor([[[4, wrong]]]), torch.float32)


def test_rows_are_staged_anew_after_they_moved() -> None:
    table, steps, _ = pair()
    ids = some_ids(1, 2, 3)
    with pytest.raises(AssertionError, match="not staged: call begin"):
        table(ids, torch.float32)
    steps.begin({3: ids})
    steps.finish()
    # Statistics of a step read its rows once more.
    table(ids, torch.float32)
    steps.updated()
    with pytest.raises(AssertionError, match="not staged: call begin"):
        table(ids, torch.float32)


def test_a_row_beyond_the_table() -> None:
    _, steps, _ = pair()
    with pytest.raises(IndexError, match="row 30 was asked for, but the table of layer 3 has 30 rows"):
        steps.begin({3: torch.tensor([[[2, 30]]])})


def test_the_parameter_is_the_owners() -> None:
    table, _, _ = pair()
    assert list(table.state_dict()) == ["weight"] and table.weight is table.owner.weight
