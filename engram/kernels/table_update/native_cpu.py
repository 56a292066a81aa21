"""Plans and row updates in C++ for CPUs, with all of torch's threads."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library
from engram.kernels.table_update.reference import RowPlan

SOURCE = Path(__file__).with_name("native.cpp")
# Reads that one thread sums alone, as in the source.
CHUNK = 512


class _Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "starts", "order")] + [("num_rows", ctypes.c_int64)]


def plan_rows_native(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = len(ids)
    rows, starts, order = (torch.empty(size, dtype=torch.int64) for size in (count, count + 1, count))
    scratch = torch.empty(2, count, 2, dtype=torch.int64)
    sizes = (ctypes.c_int64 * 2)()
    pointers = [_pointer(each) for each in (rows, starts, order, scratch[0], scratch[1])]
    load_library(SOURCE).plan_rows(_pointer(ids), ctypes.c_int64(count), *pointers, sizes)
    num_rows, alive = sizes
    return rows[:num_rows], starts[: num_rows + 1], order[:alive]


def sum_rows_native(gradient: Tensor, plan: RowPlan) -> Tensor:
    out = torch.empty(len(plan.rows), gradient.shape[1])
    _call("sum_rows", gradient, plan, _pointer(out))
    return out


def row_adam_native_(
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
    weight_decay: float,
    seed: int,
    row_ids: Tensor,
) -> None:
    state = (_pointer(each) for each in (first, second, row_step))
    settings = map(ctypes.c_double, (lr, *betas, eps, weight_decay))
    rounding = ctypes.c_uint32(seed), _pointer(row_ids)
    _call("row_adam", gradient, plan, _pointer(table), _is_bf16(table), *state, *settings, *rounding)


def rowwise_adagrad_native_(
    table: Tensor,
    square_sum: Tensor,
    gradient: Tensor,
    plan: RowPlan,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
    row_ids: Tensor,
) -> None:
    settings = map(ctypes.c_double, (lr, eps, weight_decay))
    weights = (_pointer(table), _is_bf16(table), _pointer(square_sum))
    _call("rowwise_adagrad", gradient, plan, *weights, *settings, ctypes.c_uint32(seed), _pointer(row_ids))


def _call(name: str, gradient: Tensor, plan: RowPlan, *arguments: object) -> None:
    width = gradient.shape[1]
    chunk_sums = torch.empty(len(plan.order) // CHUNK, width)
    c_plan = _Plan(plan.rows.data_ptr(), plan.starts.data_ptr(), plan.order.data_ptr(), len(plan.rows))
    function = getattr(load_library(SOURCE), name)
    shared = (ctypes.byref(c_plan), _pointer(gradient), _is_bf16(gradient), ctypes.c_int64(width), _pointer(chunk_sums))
    function(*shared, *arguments)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _is_bf16(tensor: Tensor) -> ctypes.c_bool:
    return ctypes.c_bool(tensor.dtype == torch.bfloat16)
