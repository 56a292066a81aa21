"""The operations as torch's dispatcher and compiler know them: shapes, what changes in place, which code runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram.kernels.table_update import native_cpu, reference
from engram.kernels.table_update.reference import RowPlan


@torch.library.custom_op("engram::plan_rows", mutates_args=())
def plan_rows(ids: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation("plan_rows", impl)(ids.contiguous())


@plan_rows.register_fake
def _(ids: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows, alive = context.new_dynamic_size(), context.new_dynamic_size()
    return ids.new_empty(rows), ids.new_empty(rows + 1), ids.new_empty(alive)


@torch.library.custom_op("engram::sum_rows", mutates_args=())
def sum_rows(gradient: Tensor, rows: Tensor, starts: Tensor, order: Tensor, num_reads: int, impl: str) -> Tensor:
    if gradient.device.type == "cpu":
        check_reads(rows, starts, order, num_reads)
    with torch.cuda.device_of(gradient):
        return _implementation("sum_rows", impl)(gradient, RowPlan(rows, starts, order, num_reads))


@sum_rows.register_fake
def _(gradient: Tensor, rows: Tensor, starts: Tensor, order: Tensor, num_reads: int, impl: str) -> Tensor:
    return gradient.new_empty(rows.shape[0], gradient.shape[1], dtype=torch.float32)


@torch.library.custom_op("engram::row_adam_", mutates_args=("table", "first", "second", "row_step"))
def row_adam_(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_step: Tensor,
    gradient: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    num_reads: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
    impl: str,
    row_ids: Tensor | None = None,
) -> None:
    _check_plan(table, rows, starts, order, num_reads)
    row_ids = rows if row_ids is None else row_ids
    settings = dict(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, seed=seed, row_ids=row_ids)
    plan = RowPlan(rows, starts, order, num_reads)
    if len(rows):
        with torch.cuda.device_of(table):
            _implementation("row_adam", impl)(table, first, second, row_step, gradient, plan, **settings)


@torch.library.custom_op("engram::rowwise_adagrad_", mutates_args=("table", "square_sum"))
def rowwise_adagrad_(
    table: Tensor,
    square_sum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    num_reads: int,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
    impl: str,
    row_ids: Tensor | None = None,
) -> None:
    _check_plan(table, rows, starts, order, num_reads)
    row_ids = rows if row_ids is None else row_ids
    settings = dict(lr=lr, eps=eps, weight_decay=weight_decay, seed=seed, row_ids=row_ids)
    plan = RowPlan(rows, starts, order, num_reads)
    if len(rows):
        with torch.cuda.device_of(table):
            _implementation("rowwise_adagrad", impl)(table, square_sum, gradient, plan, **settings)


def _check_plan(table: Tensor, rows: Tensor, starts: Tensor, order: Tensor, num_reads: int) -> None:
    """What kernels take for granted. Elsewhere than on CPU, looking would wait for the device."""
    if table.device.type != "cpu":
        return
    if len(rows) and rows[-1] >= len(table):
        raise IndexError(f"the plan holds row {int(rows[-1])}, but the table has only {len(table)} rows")
    check_reads(rows, starts, order, num_reads)


def check_reads(rows: Tensor, starts: Tensor, order: Tensor, num_reads: int) -> None:
    """Raises ValueError for a plan on CPU that `plan_rows` cannot have made: kernels would go out of bounds."""
    ascending = not len(rows) or (rows[0] >= 0 and bool((rows.diff() > 0).all()))
    covers = len(starts) == len(rows) + 1 and starts[0] == 0 and starts[-1] == len(order)
    if not ascending or not covers or not bool((starts.diff() > 0).all()):
        raise ValueError(
            "the plan's rows must ascend, and its starts too, from 0 to the number of reads: use plan_rows"
        )
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < num_reads:
        raise ValueError(f"the plan's order must hold places below {num_reads}, its number of ids: use plan_rows")


def _implementation(name: str, impl: str) -> Callable[..., Any]:
    functions: dict[str, Callable[..., Any]]
    if impl == "triton":
        # Imports triton, which may be absent.
        from engram.kernels.table_update import triton

        functions = {
            "sum_rows": triton.sum_rows_triton,
            "row_adam": triton.row_adam_triton_,
            "rowwise_adagrad": triton.rowwise_adagrad_triton_,
        }
    elif impl == "native":
        functions = {
            "plan_rows": native_cpu.plan_rows_native,
            "sum_rows": native_cpu.sum_rows_native,
            "row_adam": native_cpu.row_adam_native_,
            "rowwise_adagrad": native_cpu.rowwise_adagrad_native_,
        }
    else:
        functions = {
            "plan_rows": reference.plan_rows_ref,
            "sum_rows": reference.sum_rows_ref,
            "row_adam": reference.row_adam_ref_,
            "rowwise_adagrad": reference.rowwise_adagrad_ref_,
        }
    return functions[name]
