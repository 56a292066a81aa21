"""Updates of the rows that a step read: a plan of the reads, the segment sum of their gradients, the optimizer.

Plans depend on ids alone, so they can be built ahead of the gradients. An update is one pass over the touched rows:
it sums a row's gradients in float32 in a fixed order, moves weights and state, and stores them, in place. Our training
sums rows before (engram.optim.sparse says why) and updates by `RowPlan.of_sums`, with the same bits; whoever needs no
norm of the sums saves that pass.

Legend: R rows of the table, N reads, U distinct rows that were read, D width of a row.
"""

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, check_integers, choose, triton_obstacle, width_obstacle
from engram.kernels.native import native_obstacle
from engram.kernels.table_update import operators
from engram.kernels.table_update.native_cpu import SOURCE
from engram.kernels.table_update.reference import RowPlan

__all__ = ["RowPlan", "plan_rows", "row_adam_", "rowwise_adagrad_", "sum_rows"]

_DTYPES = (torch.float32, torch.bfloat16)


def plan_rows(ids: Tensor, *, impl: Implementation = "auto") -> RowPlan:
    """The plan of reads `ids` (int64, any shape, counted in order); negative ids are dead and left out.

    A stable sort by row: reads of a row keep the order of their arrival. On CUDA the sizes are read from the device,
    twice; build the plan ahead, on another stream, where that matters. Raises TypeError for other dtypes.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"plan_rows takes int64 ids, not {ids.dtype}: convert them with .long()")
    chosen = _plan_choice(impl, ids.device.type)
    rows, starts, order = operators.plan_rows(ids.flatten(), chosen)
    return RowPlan(rows, starts, order, ids.numel())


def sum_rows(gradient: Tensor, plan: RowPlan, *, impl: Implementation = "auto") -> Tensor:
    """out[u] = sum of gradient[order[starts[u] : starts[u + 1]]], float32 [U, D], always in the same order.

    `gradient` [N, D]: float32 or bfloat16, contiguous, one row for each id that the plan was made of. Raises TypeError
    and ValueError, naming what does not fit.
    """
    _check_gradient(gradient, plan)
    chosen = _choice("sum_rows", impl, gradient.device.type, gradient.shape[1])
    return operators.sum_rows(gradient, *plan, chosen)


def row_adam_(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_step: Tensor,
    gradient: Tensor,
    plan: RowPlan,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    impl: Implementation = "auto",
) -> None:
    """Adam on the plan's rows, with g the sum of a row's gradients and t its own number of updates, this one included:

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w = (1 - lr wd) w - lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps)

    In place: `table` [R, D] float32 or bfloat16 (rounded stochastically by an integer hash of seed, row and column),
    `first` and `second` [R, D] float32, `row_step` [R] int32. `gradient` as in `sum_rows`; 0 <= seed < 2^32. Where
    `table` is a part of a larger one, `row_ids` [U] int64 number the plan's rows there, for the rounding. Raises
    TypeError, ValueError, and on CPU IndexError for a row that the table does not have (elsewhere it is left out).
    """
    state = {"first": (first, table.shape), "second": (second, table.shape), "row_step": (row_step, table.shape[:1])}
    _check_update(table, gradient, plan, seed, row_ids, state)
    chosen = _choice("row_adam_", impl, table.device.type, table.shape[1])
    settings = (lr, *betas, eps, weight_decay, seed, chosen, row_ids)
    operators.row_adam_(table.detach(), first, second, row_step, gradient, *plan, *settings)


def rowwise_adagrad_(
    table: Tensor,
    square_sum: Tensor,
    gradient: Tensor,
    plan: RowPlan,
    *,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    impl: Implementation = "auto",
) -> None:
    """s = s + mean_j g_j^2;  w = (1 - lr wd) w - lr g / (sqrt(s) + eps) on the plan's rows (arXiv 1906.00091).

    In place: `square_sum` [R] float32; everything else as in `row_adam_`.
    """
    _check_update(table, gradient, plan, seed, row_ids, {"square_sum": (square_sum, table.shape[:1])})
    chosen = _choice("rowwise_adagrad_", impl, table.device.type, table.shape[1])
    settings = (lr, eps, weight_decay, seed, chosen, row_ids)
    operators.rowwise_adagrad_(table.detach(), square_sum, gradient, *plan, *settings)


# -------------------------------------------------------------------------------------------------------------- choice


@torch.compiler.assume_constant_result
def _plan_choice(impl: Implementation, device: str) -> str:
    return choose("plan_rows", impl, device, native=lambda: _native_obstacle(device))


@torch.compiler.assume_constant_result
def _choice(op: str, impl: Implementation, device: str, width: int) -> str:
    return choose(
        op, impl, device, triton=lambda: _triton_obstacle(device, width), native=lambda: _native_obstacle(device)
    )


def _native_obstacle(device: str) -> str | None:
    return native_obstacle(SOURCE) if device == "cpu" else f"it is for CPU, not {device}"


def _triton_obstacle(device: str, width: int) -> str | None:
    return width_obstacle("rows", width, most=1024) or triton_obstacle(device)


# ---------------------------------------------------------------------------------------------------------- validation


def _check_gradient(gradient: Tensor, plan: RowPlan) -> None:
    if gradient.dtype not in _DTYPES:
        raise TypeError(f"the gradient is {gradient.dtype}, but must be float32 or bfloat16")
    if gradient.ndim != 2 or not gradient.is_contiguous():
        raise ValueError(f"the gradient must be a contiguous matrix, not {list(gradient.shape)}: call .contiguous()")
    if len(gradient) != plan.num_reads:
        raise ValueError(f"the gradient has {len(gradient)} rows, but the plan was made of {plan.num_reads} ids")


def _check_update(
    table: Tensor,
    gradient: Tensor,
    plan: RowPlan,
    seed: int,
    row_ids: Tensor | None,
    state: dict[str, tuple[Tensor, torch.Size]],
) -> None:
    _check_gradient(gradient, plan)
    if table.dtype not in _DTYPES:
        raise TypeError(f"the table is {table.dtype}, but must be float32 or bfloat16")
    if table.ndim != 2 or not table.is_contiguous():
        raise ValueError(f"the table must be a contiguous matrix, not {list(table.shape)}: call .contiguous()")
    if table.shape[1] != gradient.shape[1]:
        raise ValueError(f"rows of the table are {table.shape[1]} wide, those of the gradient {gradient.shape[1]}")
    check_integers("a table update", seed=seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, but must be at least 0 and below 2^32")
    for name, (tensor, shape) in state.items():
        dtype = torch.int32 if name == "row_step" else torch.float32
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but must be {dtype}")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous tensor {list(shape)}, not {list(tensor.shape)}")
    if row_ids is None:
        row_ids = plan.rows
    if row_ids.dtype != torch.int64 or row_ids.shape != plan.rows.shape or not row_ids.is_contiguous():
        raise ValueError(
            f"row_ids must be a contiguous int64 {list(plan.rows.shape)}, one for each row of the plan, not "
            f"{row_ids.dtype} {list(row_ids.shape)}"
        )
    tensors = table, gradient, plan.rows, row_ids, *(tensor for tensor, _ in state.values())
    devices = {each.device for each in tensors}
    if len(devices) > 1:
        raise ValueError(f"table, state, gradient and plan lie on several devices: {', '.join(map(str, devices))}")
