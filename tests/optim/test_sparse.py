import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.optim.sparse import coalesce, sum_duplicate_rows

from .helpers import random_sparse_gradient, sparse_gradient


@settings(max_examples=40, deadline=None)
@given(reads=st.integers(1, 40), num_rows=st.integers(1, 12), width=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_sums_each_row_once(reads: int, num_rows: int, width: int, seed: int) -> None:
    gradient = random_sparse_gradient(num_rows, width, reads, torch.Generator().manual_seed(seed))
    rows, values = sum_duplicate_rows(gradient)
    expected: dict[int, torch.Tensor] = {}
    for row, value in zip(gradient._indices()[0].tolist(), gradient._values(), strict=True):
        expected[row] = expected.get(row, torch.zeros(width)) + value
    assert rows.tolist() == sorted(expected)
    torch.testing.assert_close(values, torch.stack([expected[row] for row in sorted(expected)]))
    again = sum_duplicate_rows(gradient)[1]
    assert torch.equal(values, again)


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
    rows, values = sum_duplicate_rows(table.weight.grad)
    assert rows.tolist() == [1, 5, 8]
    torch.testing.assert_close(values, torch.stack([weights[0] + weights[1], weights[2] + weights[3], weights[4]]))


def test_no_reads_and_expanded_values() -> None:
    rows, values = sum_duplicate_rows(sparse_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), 5))
    assert rows.shape == (0,) and values.shape == (0, 3)
    ones = torch.ones(1, 1).expand(4, 3)
    rows, values = sum_duplicate_rows(sparse_gradient(torch.tensor([2, 0, 2, 2]), ones, 5))
    assert rows.tolist() == [0, 2]
    assert values.tolist() == [[1.0] * 3, [3.0] * 3]
