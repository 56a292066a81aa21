import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.kernels.table_update import RowPlan
from engram.optim.sparse import coalesce

from .helpers import random_sparse_gradient, sparse_gradient


@settings(max_examples=40, deadline=None)
@given(reads=st.integers(1, 40), num_rows=st.integers(1, 12), width=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_sums_each_row_once(reads: int, num_rows: int, width: int, seed: int) -> None:
    gradient = random_sparse_gradient(num_rows, width, reads, torch.Generator().manual_seed(seed))
    summed = coalesce(gradient)
    rows, values = summed.indices()[0], summed.values()
    expected: dict[int, torch.Tensor] = {}
    for row, value in zip(gradient._indices()[0].tolist(), gradient._values(), strict=True):
        expected[row] = expected.get(row, torch.zeros(width)) + value
    assert rows.tolist() == sorted(expected)
    torch.testing.assert_close(values, torch.stack([expected[row] for row in sorted(expected)]))
    assert torch.equal(values, coalesce(gradient).values())


def test_coalesced_equals_torch(generator: torch.Generator) -> None:
    gradient = random_sparse_gradient(50, 7, 400, generator)
    ours, theirs = coalesce(gradient), gradient.coalesce()
    assert ours.is_coalesced()
    assert torch.equal(ours.indices(), theirs.indices())
    torch.testing.assert_close(ours.values(), theirs.values())


def test_accumulated_gradients_are_summed_together(generator: torch.Generator) -> None:
    table = torch.nn.Embedding(9, 4, sparse=True)
    tokens = torch.tensor([1, 1, 5]), torch.tensor([5, 8])
    weights = torch.randn(5, 4, generator=generator)
    (table(tokens[0]) * weights[:3]).sum().backward()
    (table(tokens[1]) * weights[3:]).sum().backward()
    assert table.weight.grad is not None and not table.weight.grad.is_coalesced()
    summed = coalesce(table.weight.grad)
    rows, values = summed.indices()[0], summed.values()
    assert rows.tolist() == [1, 5, 8]
    torch.testing.assert_close(values, torch.stack([weights[0] + weights[1], weights[2] + weights[3], weights[4]]))


def test_no_reads_and_expanded_values() -> None:
    empty = coalesce(sparse_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), 5))
    assert empty.is_coalesced()
    assert empty.values().shape == (0, 3)
    ones = torch.ones(1, 1).expand(4, 3)
    summed = coalesce(sparse_gradient(torch.tensor([2, 0, 2, 2]), ones, 5))
    assert summed.indices().tolist() == [[0, 2]]
    assert summed.values().tolist() == [[1.0] * 3, [3.0] * 3]


def test_a_coalesced_gradient_is_left_as_it_is(generator: torch.Generator) -> None:
    gradient = coalesce(random_sparse_gradient(50, 7, 400, generator))
    assert coalesce(gradient) is gradient
    plan = RowPlan.of_sums(gradient.indices()[0])
    assert plan.rows.tolist() == gradient.indices()[0].tolist()
    assert plan.order.tolist() == plan.starts[:-1].tolist() == list(range(plan.num_reads))


@pytest.mark.parametrize("rows", [[-1], [-1, -1], [-1, 2, -1, 2, -3], [-1, 4]])
def test_dead_reads_are_left_out(rows: list[int]) -> None:
    """A single one too, which torch calls coalesced."""
    gradient = torch.sparse_coo_tensor(torch.tensor([rows]), torch.ones(len(rows), 3), (5, 3), check_invariants=False)
    summed = coalesce(gradient)
    living = sorted({row for row in rows if row >= 0})
    assert summed.is_coalesced() and summed.indices().tolist() == [living]
    assert summed.values().tolist() == [[float(rows.count(row))] * 3 for row in living]


def test_bfloat16_is_summed_in_float32() -> None:
    """256 + 1 + 1 + ...: in bfloat16 every addition of 1 would be lost."""
    values = torch.tensor([[256.0]] + [[1.0]] * 64).bfloat16()
    summed = coalesce(sparse_gradient(torch.zeros(65, dtype=torch.int64), values, 3))
    assert summed.dtype == torch.bfloat16
    assert summed.values().tolist() == [[320.0]]
