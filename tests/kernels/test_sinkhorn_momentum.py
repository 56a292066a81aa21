"""Momentum with Sinkhorn balancing: every implementation against loops over rows and columns in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engram.kernels.choose import Implementation, ImplementationUnavailable
from engram.kernels.sinkhorn_momentum import sinkhorn_momentum_
from engram.kernels.sinkhorn_momentum.reference import balance_ref
from engram.kernels.table_update.part import TablePart
from tests.tolerances import assert_close

ROWS, LR, BETA, STEPS, THRESHOLD, RMS = 37, 0.05, 0.95, 11, 1e-3, 0.18
SETTINGS: dict[str, Any] = dict(lr=LR, beta=BETA, steps=STEPS, threshold=THRESHOLD, update_rms=RMS)
IMPLS = [("reference", 5), ("native", 5), ("native", 80), ("triton", 16), ("triton", 80)]


def balanced_by_loop(matrix: Tensor, steps: int, threshold: float) -> tuple[Tensor, list[int]]:
    balanced = matrix.double().clone()
    norms = [math.sqrt(float((line**2).sum())) for line in balanced]
    active = [index for index, norm in enumerate(norms) if norm > threshold * sum(norms) / len(norms)]
    for index in range(len(balanced)):
        if index not in active:
            balanced[index] = 0
    for step in range(1, steps + 1):
        lines = [balanced[index] for index in active] if step % 2 else list(balanced.T)
        for line in lines:
            line /= math.sqrt(float((line**2).sum())) or 1.0
    return balanced, active


def gradient_of(rows: Tensor, width: int) -> Tensor:
    """Rows and columns of very different size."""
    return torch.randn(len(rows), width) * torch.logspace(-1, 1, width) * torch.logspace(-1, 1, len(rows))[:, None]


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e24])
@pytest.mark.parametrize(("impl", "width"), IMPLS)
def test_equals_loops(impl: Implementation, width: int, scale: float) -> None:
    table = torch.randn(ROWS, width)
    momentum, weight, mean = torch.zeros(ROWS, width), table.double(), torch.zeros(ROWS, width, dtype=torch.float64)
    for count in (20, 3, 0):
        rows = torch.randperm(ROWS)[:count].sort().values
        gradient = gradient_of(rows, width) * scale
        dense = torch.zeros_like(mean).index_copy_(0, rows, gradient.double())
        mean = BETA * mean + (1 - BETA) * dense
        balanced, active = balanced_by_loop(BETA * mean + (1 - BETA) * dense, STEPS, THRESHOLD)
        weight[active] *= 1 - LR * 0.1
        weight -= LR * RMS * math.sqrt(width) * balanced
        sinkhorn_momentum_(table, momentum, gradient, rows, **SETTINGS, weight_decay=0.1, impl=impl)
    assert_close(table, weight, "table_update", name="table")
    assert_close(momentum / scale, mean / scale, "table_update", name="momentum")


@pytest.mark.parametrize(("impl", "width"), IMPLS)
def test_inactive_rows_and_columns_of_zeros_rest(impl: Implementation, width: int) -> None:
    start, gradient = torch.randn(ROWS, width), torch.randn(ROWS, width)
    gradient[:, 2] = 0
    # Row 3 lies below a thousandth of the mean, row 6 above, row 8 is zero.
    gradient[3], gradient[6], gradient[8] = gradient[3] * 1e-4, gradient[6] * 1e-2, 0
    table, momentum = start.clone(), torch.zeros(ROWS, width)
    sinkhorn_momentum_(table, momentum, gradient, torch.arange(ROWS), **SETTINGS, weight_decay=0.1, impl=impl)
    assert (table == start).all(dim=1).nonzero()[:, 0].tolist() == [3, 8]
    active = torch.tensor([row for row in range(ROWS) if row not in (3, 8)])
    assert_close(table[active, 2], start[active, 2] * (1 - LR * 0.1), "table_update", name="column of zeros")
    moved = (table - start * (1 - LR * 0.1))[active].square().mean(1).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, LR * RMS), rtol=1e-3, atol=0.0)
    assert momentum[3].count_nonzero() == width - 1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("impl", "width"), IMPLS)
def test_few_steps(impl: Implementation, width: int, steps: int) -> None:
    table, gradient = torch.zeros(ROWS, width), gradient_of(torch.arange(ROWS), width)
    settings = SETTINGS | {"steps": steps}
    sinkhorn_momentum_(table, torch.zeros_like(table), gradient, torch.arange(ROWS), **settings, impl=impl)
    expected, _ = balanced_by_loop(gradient, steps, THRESHOLD)
    assert_close(table, -LR * RMS * math.sqrt(width) * expected, "table_update")


def test_balancing_ends_on_rows_and_evens_out_columns() -> None:
    matrix = torch.randn(40, 7) * torch.logspace(-2, 2, 7)
    balanced, active = balance_ref(matrix, 11, 1e-3)
    assert active.all()
    torch.testing.assert_close(balanced.norm(dim=1), torch.ones(40), rtol=1e-5, atol=0.0)
    # The squares of 40 rows of norm 1 spread evenly over the columns; one step on rows alone leaves them uneven.
    torch.testing.assert_close(balanced.square().sum(dim=0), torch.full((7,), 40 / 7), rtol=0.05, atol=0.0)
    assert balance_ref(matrix, 1, 1e-3)[0].square().sum(dim=0).min() < 0.1


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_bfloat16_tables_equal_the_reference(impl: Implementation) -> None:
    start, rows = torch.randn(ROWS, 48).bfloat16(), torch.randperm(ROWS)[:20].sort().values
    gradient, tables = torch.randn(20, 48).bfloat16(), []
    for each in (impl, "reference"):
        table = start.clone()
        sinkhorn_momentum_(table, torch.zeros(ROWS, 48), gradient, rows, **SETTINGS, seed=2**32 - 1, impl=each)
        tables.append(table)
    assert (tables[0] != tables[1]).float().mean() < 0.01
    resting = [row for row in range(ROWS) if row not in rows.tolist()]
    assert torch.equal(tables[0][resting], start[resting])


@pytest.mark.parametrize("impl", ["auto", "reference", "native", "triton"])
def test_nothing_to_move(impl: Implementation) -> None:
    none = torch.empty(0, dtype=torch.int64)
    for num_rows in (0, 3):
        table, momentum = torch.ones(num_rows, 16), torch.zeros(num_rows, 16)
        if num_rows or impl != "reference":
            sinkhorn_momentum_(table, momentum, torch.empty(0, 16), none, **SETTINGS, impl=impl)
        assert torch.equal(table, torch.ones(num_rows, 16))
        assert not momentum.any()


def test_native_bits_do_not_depend_on_threads() -> None:
    rows, start, before = torch.arange(0, 5000, 3), torch.randn(5000, 24), torch.get_num_threads()
    gradient, outcomes = torch.randn(len(rows), 24), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            table, momentum = start.clone(), torch.randn(5000, 24, generator=torch.Generator().manual_seed(1))
            sinkhorn_momentum_(table, momentum, gradient, rows, **SETTINGS, impl="native")
            outcomes.append((table, momentum))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], other, strict=True))


def test_a_part_that_is_the_whole_changes_nothing() -> None:
    rows, start = torch.randperm(ROWS)[:20].sort().values, torch.randn(ROWS, 16).bfloat16()
    part = TablePart(lambda each: each, ROWS, lambda each: each, lambda each: each)
    gradient, tables = torch.randn(20, 16), []
    for settings in (dict(part=part), dict(impl="reference")):
        table = start.clone()
        sinkhorn_momentum_(table, torch.zeros(ROWS, 16), gradient, rows, **SETTINGS, seed=3, **settings)
        tables.append(table)
    # Column norms are taken in float64 there.
    assert (tables[0] != tables[1]).float().mean() < 0.01
    for impl in ("native", "triton"):
        with pytest.raises(ImplementationUnavailable, match=f"the {impl} implementation .* the table is divided"):
            sinkhorn_momentum_(**arguments(part=part, impl=impl))


def arguments(**changes: Any) -> dict[str, Any]:
    tensors = dict(table=torch.zeros(4, 16), momentum=torch.zeros(4, 16))
    return tensors | dict(gradient=torch.zeros(2, 16), rows=torch.tensor([1, 3])) | SETTINGS | changes


def test_operator_is_what_it_declares_and_compiles() -> None:
    table, rows, gradient = torch.randn(ROWS, 16), torch.tensor([1, 5]), torch.randn(2, 16)
    given = (table, torch.zeros_like(table), gradient, rows, LR, BETA, STEPS, THRESHOLD, RMS, 0.1, 0, "native")
    torch.library.opcheck(torch.ops.engram.sinkhorn_momentum_.default, given)

    def update(table: Tensor, momentum: Tensor) -> None:
        sinkhorn_momentum_(table, momentum, gradient, rows, **SETTINGS)

    outcomes = []
    for run in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        changed, momentum = table.clone(), torch.zeros_like(table)
        run(changed, momentum)
        outcomes.append((changed, momentum))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"table": torch.zeros(4, 16).double()}, TypeError, "table is torch.float64, but must be torch.float32 or"),
        ({"momentum": torch.zeros(4, 16).bfloat16()}, TypeError, "momentum is torch.bfloat16"),
        ({"momentum": torch.zeros(5, 16)}, ValueError, r"momentum is \[5, 16\], but the table is \[4, 16\]"),
        ({"table": torch.zeros(16, 4).T}, ValueError, "table must be a contiguous matrix"),
        (
            {"gradient": torch.zeros(3, 16)},
            ValueError,
            r"gradient is \[3, 16\], but 2 rows of width 16 have a gradient",
        ),
        ({"rows": torch.tensor([1, 3]).int()}, TypeError, "rows must be a contiguous int64 vector, not torch.int32"),
        ({"rows": torch.tensor([1, 4])}, IndexError, "row 4 has a gradient, but the table has rows 0 to 3"),
        ({"rows": torch.tensor([-1, 3])}, IndexError, "row -1 has a gradient, but the table has rows 0 to 3"),
        ({"rows": torch.tensor([3, 1])}, ValueError, "rows must be distinct and ascend"),
        ({"rows": torch.tensor([3, 3])}, ValueError, "rows must be distinct and ascend"),
        ({"rows": torch.tensor([[1, 3]])}, TypeError, r"int64 vector, not torch.int64 \[1, 2\]"),
        ({"steps": 10}, ValueError, "steps is 10, but an odd number is needed"),
        ({"steps": 11.0}, TypeError, "sinkhorn_momentum_ needs an integer for steps, not 11.0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 0.5}, TypeError, "sinkhorn_momentum_ needs an integer for seed, not 0.5"),
        ({"impl": "cuda"}, ValueError, "sinkhorn_momentum_ has no implementation 'cuda'"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sinkhorn_momentum_(**arguments(**changes))


def test_unsupported_width_is_named() -> None:
    given = arguments(table=torch.zeros(4, 8), momentum=torch.zeros(4, 8), gradient=torch.zeros(2, 8))
    with pytest.raises(ImplementationUnavailable, match="rows are 8 wide, and it takes .* multiples of 16 up to 1024"):
        sinkhorn_momentum_(**given, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 80, 256])
def test_cuda_equals_the_reference(width: int, dtype: torch.dtype) -> None:
    start, rows = torch.randn(10_007, width).to(dtype).cuda(), torch.arange(0, 10_007, 5).cuda()
    gradient, outcomes = torch.randn(len(rows), width).to(dtype).cuda(), []
    for impl in ("auto", "auto", "reference"):
        table, momentum = start.clone(), torch.zeros(10_007, width, device="cuda")
        for _ in range(3):
            sinkhorn_momentum_(table, momentum, gradient, rows, **SETTINGS, seed=5, impl=impl)
        outcomes.append((table, momentum))
    assert all(torch.equal(*pair) for pair in zip(*outcomes[:2], strict=True))
    assert_close(outcomes[1][0], outcomes[2][0], "table_update", name="table", dtype=dtype)
    assert_close(outcomes[1][1], outcomes[2][1], "table_update", name="momentum")
