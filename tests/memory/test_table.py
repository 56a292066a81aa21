"""hash ids -> rows: values, and the sparse gradient against a dense scatter written as a loop."""

import pytest
import torch

from engram.memory.table import RowTable, _neutralise_dead
from tests.tolerances import assert_close

ROWS, WIDTH = 23, 5


def fresh_table(dtype: torch.dtype = torch.float32) -> RowTable:
    return RowTable(ROWS, WIDTH, init_std=1.0, dtype=dtype)


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
    table, ids = fresh_table(), ids_with_duplicates_and_dead()
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
    table, ids = fresh_table(), ids_with_duplicates_and_dead()
    table.dense_gradients = True
    rows = table(ids, torch.float32)
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    assert table.weight.grad is not None
    assert not table.weight.grad.is_sparse
    assert_close(table.weight.grad, gradient_by_loop(cotangent, ids), "table", name="weight.grad")


def test_gradient_equals_that_of_plain_indexing() -> None:
    table, ids = fresh_table(), torch.randint(0, ROWS, (2, 9, 3))
    weight = table.weight.detach().clone().requires_grad_()
    target = torch.randn(2, 9, 3 * WIDTH)
    ((table(ids, torch.float32) - target) ** 2).sum().backward()
    ((weight[ids].flatten(-2) - target) ** 2).sum().backward()
    assert_close(table.weight.grad, weight.grad, "table", name="weight.grad")


def test_gradients_of_two_reads_add_up() -> None:
    table = fresh_table()
    first, second = torch.randint(0, ROWS, (2, 3, 1)), torch.randint(0, ROWS, (4, 5, 1))
    table(first, torch.float32).sum().backward()
    (3 * table(second, torch.float32)).sum().backward()
    expected = torch.bincount(first.flatten(), minlength=ROWS) + 3 * torch.bincount(second.flatten(), minlength=ROWS)
    assert table.weight.grad is not None
    assert table.weight.grad.to_dense().tolist() == expected[:, None].expand(-1, WIDTH).tolist()


def test_untouched_rows_have_no_gradient() -> None:
    table = fresh_table()
    table(torch.tensor([[[4, -1], [9, 4]]]), torch.float32).sum().backward()
    assert table.weight.grad is not None
    gradient = table.weight.grad.coalesce()
    assert gradient.indices().tolist() == [[4, 9]]
    assert gradient.values().tolist() == [[2.0] * WIDTH, [1.0] * WIDTH]


def test_a_gradient_that_sums_to_zero_keeps_its_row() -> None:
    # Finding touched rows by a non-zero sum, as a well-known engine does, would lose this one.
    table = fresh_table()
    table(torch.tensor([[[6]]]), torch.float32).backward(torch.tensor([[[1.0, -1.0, 2.0, -2.0, 0.0]]]))
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices().tolist() == [[6]]


def test_dead_ids_neither_read_nor_write() -> None:
    table = fresh_table()
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
    table = fresh_table()
    rows = table(torch.full((2, 3, 2), -1), torch.float32)
    assert rows.tolist() == torch.zeros(2, 3, 2 * WIDTH).tolist()
    rows.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad._nnz() == 0
    assert table.weight.grad.shape == (ROWS, WIDTH)


def test_bfloat16_reads_give_float32_gradients() -> None:
    table, ids = fresh_table(), ids_with_duplicates_and_dead()
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


def test_a_bfloat16_table_reads_exactly_and_has_bfloat16_gradients() -> None:
    table, ids = fresh_table(torch.bfloat16), ids_with_duplicates_and_dead()
    assert table.weight.dtype == torch.bfloat16
    rows = table(ids, torch.float32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows.double(), read_by_loop(table.weight, ids))
    rows.backward(torch.randn_like(rows).bfloat16().float())
    assert table.weight.grad is not None
    # Each read's gradient is stored as it came: rows are summed later, in float32.
    assert table.weight.grad._values().dtype == torch.bfloat16
    assert table.weight.grad._values().shape == (int((ids >= 0).sum()), WIDTH)


def test_without_waiting_for_the_device_dead_ids_change_no_sum() -> None:
    """The GPU's way: as many rows as ids, but no row more than was read, and no other sums."""
    ids, cotangent = ids_with_duplicates_and_dead(), torch.randn(3, 7, 4 * WIDTH)
    rows, values = _neutralise_dead(ids.flatten(), cotangent.view(-1, WIDTH))
    assert set(rows.tolist()) == set(ids[ids >= 0].tolist())
    sums = torch.zeros(ROWS, WIDTH).index_add_(0, rows, values)
    assert_close(sums, gradient_by_loop(cotangent, ids), "table", name="weight.grad")


def test_dead_ids_alone_stay_dead_without_waiting_for_the_device() -> None:
    rows, values = _neutralise_dead(torch.full((3,), -1), torch.full((3, WIDTH), float("inf")))
    assert rows.tolist() == [-1, -1, -1]
    assert values.tolist() == torch.zeros(3, WIDTH).tolist()
    empty, _ = _neutralise_dead(torch.zeros(0, dtype=torch.int64), torch.zeros(0, WIDTH))
    assert empty.tolist() == []


def test_rows_without_a_spread_are_left_to_the_models_initialiser() -> None:
    # Uninitialised memory holds NaN in tests.
    assert RowTable(ROWS, WIDTH).weight.isnan().all()


def test_ids_beyond_the_table_are_refused() -> None:
    with pytest.raises(IndexError, match=f"row id {ROWS} at .0, 0, 0. .* 0 to {ROWS - 1}"):
        fresh_table()(torch.tensor([[[ROWS]]]), torch.float32)


@pytest.mark.parametrize("init_std", [0.0, 0.25, 1.0])
def test_initial_rows(init_std: float) -> None:
    weight = RowTable(400, 100, init_std=init_std).weight.detach()
    assert abs(float(weight.std()) - init_std) <= 0.02 * init_std
    assert abs(float(weight.mean())) <= 0.02 * init_std


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_owner_reads_rows_and_takes_their_gradient(dtype: torch.dtype, dense: bool) -> None:
    table = fresh_table(dtype)
    table.dense_gradients = dense
    table.weight.grad_dtype = torch.float32
    ids = torch.tensor([7, 2, 7, 22])
    table.ensure(ids.unique())
    rows = table.read(ids)
    assert rows.dtype == dtype
    assert not rows.requires_grad
    assert torch.equal(rows, table.weight.detach()[ids])
    gradient = torch.randn(3, WIDTH)
    table.accumulate(torch.tensor([2, 7, 22]), gradient)
    found = table.weight.grad
    assert found is not None
    assert found.is_sparse != dense
    assert found.dtype == torch.float32
    expected = torch.zeros(ROWS, WIDTH)
    expected[[2, 7, 22]] = gradient
    assert torch.equal(found.to_dense(), expected)
