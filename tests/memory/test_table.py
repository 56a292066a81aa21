"""hash ids -> rows: values, and the sparse gradient against a dense scatter written as a loop."""

import pytest
import torch

from engram.memory.table import RowTable
from tests.tolerances import assert_close

ROWS, WIDTH = 23, 5


def read_by_loop(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    output = torch.zeros(*ids.shape[:-1], ids.shape[-1] * WIDTH, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in ids.shape)).tolist():
        row, head = int(ids[tuple(place)]), place[-1]
        if row >= 0:
            output[(*place[:-1], slice(head * WIDTH, (head + 1) * WIDTH))] = weight[row].double()
    return output


def gradient_by_loop(cotangent: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    gradient = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in ids.shape)).tolist():
        row, head = int(ids[tuple(place)]), place[-1]
        if row >= 0:
            gradient[row] += cotangent[tuple(place[:-1])][head * WIDTH : (head + 1) * WIDTH].double()
    return gradient


def ids_with_duplicates_and_dead() -> torch.Tensor:
    ids = torch.randint(0, ROWS, (3, 7, 4))
    ids[0, :3] = 11
    ids[1, 2] = -1
    ids[2, 5, 1:3] = -1
    return ids


def test_rows_and_gradient() -> None:
    table, ids = RowTable(ROWS, WIDTH), ids_with_duplicates_and_dead()
    rows = table(ids, torch.float32)
    assert torch.equal(rows.double(), read_by_loop(table.weight, ids))
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    gradient = table.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.dtype == torch.float32
    # One stored row for each living id: no table-sized tensor, and none for dead ids.
    assert gradient._values().shape == (int((ids >= 0).sum()), WIDTH)
    assert_close(gradient, gradient_by_loop(cotangent, ids), "table", name="weight.grad")


def test_dense_gradients_are_the_same_numbers() -> None:
    table, ids = RowTable(ROWS, WIDTH), ids_with_duplicates_and_dead()
    table.dense_gradients = True
    rows = table(ids, torch.float32)
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    assert table.weight.grad is not None
    assert not table.weight.grad.is_sparse
    assert_close(table.weight.grad, gradient_by_loop(cotangent, ids), "table", name="weight.grad")


def test_gradient_equals_that_of_plain_indexing() -> None:
    table, ids = RowTable(ROWS, WIDTH), torch.randint(0, ROWS, (2, 9, 3))
    weight = table.weight.detach().clone().requires_grad_()
    target = torch.randn(2, 9, 3 * WIDTH)
    ((table(ids, torch.float32) - target) ** 2).sum().backward()
    ((weight[ids].flatten(-2) - target) ** 2).sum().backward()
    assert_close(table.weight.grad, weight.grad, "table", name="weight.grad")


def test_gradients_of_two_reads_add_up() -> None:
    table = RowTable(ROWS, WIDTH)
    first, second = torch.randint(0, ROWS, (2, 3, 1)), torch.randint(0, ROWS, (4, 5, 1))
    table(first, torch.float32).sum().backward()
    (3 * table(second, torch.float32)).sum().backward()
    expected = torch.bincount(first.flatten(), minlength=ROWS) + 3 * torch.bincount(second.flatten(), minlength=ROWS)
    assert table.weight.grad is not None
    assert table.weight.grad.to_dense().tolist() == expected[:, None].expand(-1, WIDTH).tolist()


def test_untouched_rows_have_no_gradient() -> None:
    table = RowTable(ROWS, WIDTH)
    table(torch.tensor([[[4, -1], [9, 4]]]), torch.float32).sum().backward()
    assert table.weight.grad is not None
    gradient = table.weight.grad.coalesce()
    assert gradient.indices().tolist() == [[4, 9]]
    assert gradient.values().tolist() == [[2.0] * WIDTH, [1.0] * WIDTH]


def test_a_gradient_that_sums_to_zero_keeps_its_row() -> None:
    # Finding touched rows by a non-zero sum, as a well-known engine does, would lose this one.
    table = RowTable(ROWS, WIDTH)
    table(torch.tensor([[[6]]]), torch.float32).backward(torch.tensor([[[1.0, -1.0, 2.0, -2.0, 0.0]]]))
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices().tolist() == [[6]]


def test_dead_ids_neither_read_nor_write() -> None:
    table = RowTable(ROWS, WIDTH)
    with torch.no_grad():
        # The rows that a clamped or wrapped -1 would hit: 0 times infinity is NaN.
        table.weight[0] = float("inf")
        table.weight[-1] = float("nan")
    rows = table(torch.tensor([[[-1, 3], [-1, -1]]]), torch.float32)
    assert rows[0, 0].tolist() == [0.0] * WIDTH + table.weight[3].tolist()
    assert rows[0, 1].tolist() == [0.0] * (2 * WIDTH)
    rows.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices().tolist() == [[3]]


def test_only_dead_ids_give_an_empty_gradient() -> None:
    table = RowTable(ROWS, WIDTH)
    rows = table(torch.full((2, 3, 2), -1), torch.float32)
    assert rows.tolist() == torch.zeros(2, 3, 2 * WIDTH).tolist()
    rows.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad._nnz() == 0
    assert table.weight.grad.shape == (ROWS, WIDTH)


def test_bfloat16_reads_give_float32_gradients() -> None:
    table, ids = RowTable(ROWS, WIDTH), ids_with_duplicates_and_dead()
    rows = table(ids, torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows.double(), read_by_loop(table.weight.bfloat16(), ids))
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    assert table.weight.dtype == torch.float32
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == torch.float32
    # Row 11 is hit twelve times: a sum kept in bfloat16 would be off by far more than this tolerance.
    assert_close(table.weight.grad, gradient_by_loop(cotangent, ids), "table", name="weight.grad")


def test_ids_beyond_the_table_are_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        RowTable(ROWS, WIDTH)(torch.tensor([[[ROWS]]]), torch.float32)


@pytest.mark.parametrize("init_std", [0.0, 0.25, 1.0])
def test_initial_rows(init_std: float) -> None:
    weight = RowTable(400, 100, init_std=init_std).weight.detach()
    assert abs(float(weight.std()) - init_std) <= 0.02 * init_std
    assert abs(float(weight.mean())) <= 0.02 * init_std
