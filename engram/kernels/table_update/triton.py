"""Segment sums and row updates on GPUs: one kernel, and before it two short ones for rows that were read very often.

Reads are sorted by row. Each aligned CHUNK of them that lies within one row's reads is summed by a program of its own;
the program of a row's first such chunk adds up the row's chunks and what sticks out on both sides. All other rows are
summed by the program that updates them. Every sum has a fixed order, and there are no atomics. Bfloat16 tables travel
as int16, since their rounding is integer arithmetic.

Legend: U distinct rows that were read, D width of a row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.compile_ahead import Build
from engram.kernels.table_update.reference import RowPlan
from engram.kernels.table_update.rounding import COLUMN_STEP, MIX_1, MIX_2

# Reads that one program sums at once: a tile of 32 x 256 leaves each of 128 threads 64 registers' worth.
CHUNK = 32

_MIX_1, _MIX_2, _COLUMN_STEP = tl.constexpr(MIX_1), tl.constexpr(MIX_2), tl.constexpr(COLUMN_STEP)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= tl.full((), _MIX_1, tl.uint32)
    x ^= x >> 15
    x *= tl.full((), _MIX_2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def load_rows(pointers, mask):
    """float32 or bfloat16 (as int16) in memory -> float32."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def store_rows(pointers, values, rows, columns, seed, mask):
    """The inverse, rounding stochastically as rounding.py does; `rows` int64: numbers in the whole table."""
    if pointers.dtype.element_ty == tl.int16:
        bits = values.to(tl.uint32, bitcast=True)
        low, high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
        key = _mix(_mix(_mix(tl.zeros_like(low) + seed.to(tl.uint32, bitcast=True)) ^ low) ^ high)
        random = _mix(key[:, None] + columns.to(tl.uint32)[None, :] * tl.full((), _COLUMN_STEP, tl.uint32)) >> 16
        special = tl.where(values != values, 0x7FC0, bits >> 16)
        rounded = tl.where((bits & 0x7F800000) == 0x7F800000, special, (bits + random) >> 16)
        tl.store(pointers, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def _load_reads(gradient, order, reads, mask, columns, D: tl.constexpr):
    """Gradients of sorted reads [n] -> float32 [n, COLUMNS], zeros where `mask` is off."""
    position = tl.load(order + reads[:, None], mask=mask[:, None], other=0)
    inside = mask[:, None] & (columns < D)[None, :]
    return load_rows(gradient + position * D + columns[None, :], inside)


@triton.jit
def _run_of(starts, num_rows, read):
    """The index u of the row that a sorted read belongs to, by bisection."""
    low = 0
    high = num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts + middle) <= read:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _sum_chunks_kernel(
    gradient, order, starts, chunk_sums, num_rows, D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    end = tl.load(starts + _run_of(starts, num_rows, chunk * CHUNK) + 1)
    if end >= (chunk + 1) * CHUNK:
        columns = tl.arange(0, COLUMNS)
        reads = chunk * CHUNK + tl.arange(0, CHUNK)
        tile = _load_reads(gradient, order, reads, reads >= 0, columns, D)
        tl.store(chunk_sums + chunk * D + columns, tl.sum(tile, axis=0), mask=columns < D)


@triton.jit
def _sum_hot_rows_kernel(
    gradient, order, starts, chunk_sums, hot_sums, num_rows, D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    """hot_sums[chunk] = the whole sum of the row whose first chunk this is."""
    chunk = tl.program_id(0).to(tl.int64)
    run = _run_of(starts, num_rows, chunk * CHUNK)
    begin, end = tl.load(starts + run), tl.load(starts + run + 1)
    if (end >= (chunk + 1) * CHUNK) & (begin > (chunk - 1) * CHUNK):
        columns = tl.arange(0, COLUMNS)
        lane = tl.arange(0, CHUNK)
        last = end // CHUNK
        head, tail = begin + lane, last * CHUNK + lane
        total = _load_reads(gradient, order, head, head < chunk * CHUNK, columns, D)
        for first in range(chunk, last, CHUNK):
            inside = (first + lane < last)[:, None] & (columns < D)[None, :]
            total += tl.load(chunk_sums + (first + lane)[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += _load_reads(gradient, order, tail, tail < end, columns, D)
        tl.store(hot_sums + chunk * D + columns, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def _row_sums(gradient, order, starts, hot_sums, u, live, columns, D: tl.constexpr, CHUNK: tl.constexpr):
    """Summed gradients of the rows u [n] -> float32 [n, COLUMNS]."""
    begin = tl.load(starts + u, mask=live, other=0)
    end = tl.load(starts + u + 1, mask=live, other=0)
    chunk = (begin + CHUNK - 1) // CHUNK
    hot = (chunk + 1) * CHUNK <= end
    inside = hot[:, None] & (columns < D)[None, :]
    total = tl.load(hot_sums + chunk[:, None] * D + columns[None, :], mask=inside, other=0.0)
    stop = tl.where(hot, begin, end)
    for read in range(tl.max(stop - begin, axis=0)):
        total += _load_reads(gradient, order, begin + read, begin + read < stop, columns, D)
    return total


@triton.jit
def _sum_rows_kernel(
    gradient,
    order,
    starts,
    hot_sums,
    out,
    num_rows,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = u < num_rows
    columns = tl.arange(0, COLUMNS)
    total = _row_sums(gradient, order, starts, hot_sums, u, live, columns, D, CHUNK)
    tl.store(out + u[:, None] * D + columns[None, :], total, mask=live[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["seed"])
def _row_adam_kernel(
    gradient,
    order,
    starts,
    hot_sums,
    rows,
    row_ids,
    table,
    first,
    second,
    row_step,
    num_rows,
    table_rows,
    seed,
    lr,
    log2_beta1,
    rise1,
    beta2,
    log2_beta2,
    rise2,
    eps,
    keep,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + u, mask=u < num_rows, other=table_rows)
    live = row < table_rows
    row_id = tl.load(row_ids + u, mask=live, other=0)
    columns = tl.arange(0, COLUMNS)
    inside = live[:, None] & (columns < D)[None, :]
    g = _row_sums(gradient, order, starts, hot_sums, u, live, columns, D, CHUNK)
    at = row[:, None] * D + columns[None, :]
    step = tl.load(row_step + row, mask=live, other=0) + 1
    tl.store(row_step + row, step, mask=live)
    m = tl.load(first + at, mask=inside, other=0.0)
    m += rise1 * (g - m)
    tl.store(first + at, m, mask=inside)
    v = beta2 * tl.load(second + at, mask=inside, other=0.0) + rise2 * g * g
    tl.store(second + at, v, mask=inside)
    # In float64, since 1 - beta^t cancels.
    size = lr / (1 - tl.exp2(step.to(tl.float64) * log2_beta1)).to(tl.float32)
    unbias = 1 / (1 - tl.exp2(step.to(tl.float64) * log2_beta2)).to(tl.float32)
    update = size[:, None] * m / (tl.sqrt(v * unbias[:, None]) + eps)
    store_rows(table + at, keep * load_rows(table + at, inside) - update, row_id, columns, seed, inside)


@triton.jit(do_not_specialize=["seed"])
def _rowwise_adagrad_kernel(
    gradient,
    order,
    starts,
    hot_sums,
    rows,
    row_ids,
    table,
    square_sum,
    num_rows,
    table_rows,
    seed,
    lr,
    eps,
    keep,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + u, mask=u < num_rows, other=table_rows)
    live = row < table_rows
    row_id = tl.load(row_ids + u, mask=live, other=0)
    columns = tl.arange(0, COLUMNS)
    inside = live[:, None] & (columns < D)[None, :]
    g = _row_sums(gradient, order, starts, hot_sums, u, live, columns, D, CHUNK)
    at = row[:, None] * D + columns[None, :]
    w = keep * load_rows(table + at, inside)
    squares = tl.load(square_sum + row, mask=live, other=0.0) + tl.sum(g * g, axis=1) / D
    tl.store(square_sum + row, squares, mask=live)
    update = (lr / (tl.sqrt(squares) + eps))[:, None] * g
    store_rows(table + at, w - update, row_id, columns, seed, inside)


# ------------------------------------------------------------------------------------------------------------ launches


def sum_rows_triton(gradient: Tensor, plan: RowPlan) -> Tensor:
    out = torch.empty(len(plan.rows), gradient.shape[1], device=gradient.device)
    if len(plan.rows):
        shape = tile_shape(gradient.shape[1])
        sources = _sources(gradient, plan)
        _sum_rows_kernel[_grid(plan, shape)](*sources, out, len(plan.rows), **shape, CHUNK=CHUNK)
    return out


def row_adam_triton_(
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
    shape, (beta1, beta2) = tile_shape(table.shape[1]), betas
    tensors = (*_sources(gradient, plan), plan.rows, row_ids, as_stored(table), first, second, row_step)
    sizes = (len(plan.rows), len(table), as_int32(seed))
    settings = (lr, _log2(beta1), 1 - beta1, beta2, _log2(beta2), 1 - beta2, eps, 1 - lr * weight_decay)
    _row_adam_kernel[_grid(plan, shape)](*tensors, *sizes, *settings, **shape, CHUNK=CHUNK)


def rowwise_adagrad_triton_(
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
    shape = tile_shape(table.shape[1])
    tensors = (*_sources(gradient, plan), plan.rows, row_ids, as_stored(table), square_sum)
    sizes = (len(plan.rows), len(table), as_int32(seed))
    settings = (lr, eps, 1 - lr * weight_decay)
    _rowwise_adagrad_kernel[_grid(plan, shape)](*tensors, *sizes, *settings, **shape, CHUNK=CHUNK)


def as_stored(table: Tensor) -> Tensor:
    return table.view(torch.int16) if table.dtype == torch.bfloat16 else table


def as_int32(seed: int) -> int:
    """The same 32 bits with a sign: one integer type for every seed, so that no launch compiles anew."""
    return seed - 2**32 if seed >= 2**31 else seed


def tile_shape(width: int) -> dict[str, int]:
    """512 entries a tile: one vector of 4 for each thread of 4 warps, in each of about six arrays."""
    columns = triton.next_power_of_2(width)
    return dict(D=width, COLUMNS=columns, ROWS=max(1, 512 // columns))


def _sources(gradient: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, order and starts, and the sums of hot rows at the row of their first chunk."""
    chunks, width = len(plan.order) // CHUNK, gradient.shape[1]
    reads = (as_stored(gradient), plan.order, plan.starts)
    chunk_sums, hot_sums = (torch.empty(chunks, width, device=gradient.device) for _ in range(2))
    if chunks:
        shape = dict(D=width, COLUMNS=triton.next_power_of_2(width), CHUNK=CHUNK, num_warps=_chunk_warps(width))
        _sum_chunks_kernel[(chunks,)](*reads, chunk_sums, len(plan.rows), **shape)
        _sum_hot_rows_kernel[(chunks,)](*reads, chunk_sums, hot_sums, len(plan.rows), **shape)
    return (*reads, hot_sums)


def _chunk_warps(width: int) -> int:
    """So many that a tile of CHUNK rows takes 64 registers of a thread."""
    return max(4, CHUNK * triton.next_power_of_2(width) // (64 * 32))


def _grid(plan: RowPlan, shape: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(len(plan.rows), shape["ROWS"]),)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


def builds() -> list[Build]:
    """Rows of the small configs (16), of Engram-27B (80) and of V4.1 (256)."""
    return [build for width in (16, 80, 256) for stored in ("fp32", "i16") for build in _builds(width, stored)]


def _builds(width: int, stored: str) -> list[Build]:
    shape: dict[str, Any] = dict(**tile_shape(width), CHUNK=CHUNK)
    chunk = {name: shape[name] for name in ("D", "COLUMNS", "CHUNK")}
    sources = {"gradient": f"*{stored}", "order": "*i64", "starts": "*i64"}
    sums = dict.fromkeys(("chunk_sums", "hot_sums"), "*fp32")
    label, warps = f"{width} {stored}", _chunk_warps(width)
    read = {**sources, "hot_sums": "*fp32"}
    sizes = {"num_rows": "i32", "table_rows": "i32", "seed": "i32"}
    adam = dict.fromkeys(("lr", "log2_beta1", "rise1", "beta2", "log2_beta2", "rise2", "eps", "keep"), "fp32")
    adagrad = dict.fromkeys(("lr", "eps", "keep"), "fp32")
    table = {**read, "rows": "*i64", "row_ids": "*i64", "table": f"*{stored}"}
    state = {"first": "*fp32", "second": "*fp32", "row_step": "*i32"}
    return [
        Build(
            f"sum_chunks {label}",
            _sum_chunks_kernel,
            {**sources, "chunk_sums": "*fp32", "num_rows": "i32"},
            chunk,
            num_warps=warps,
        ),
        Build(
            f"sum_hot_rows {label}",
            _sum_hot_rows_kernel,
            {**sources, **sums, "num_rows": "i32"},
            chunk,
            num_warps=warps,
        ),
        Build(f"sum_rows {label}", _sum_rows_kernel, {**read, "out": "*fp32", "num_rows": "i32"}, shape),
        Build(f"row_adam {label}", _row_adam_kernel, {**table, **state, **sizes, **adam}, shape),
        Build(
            f"rowwise_adagrad {label}",
            _rowwise_adagrad_kernel,
            {**table, "square_sum": "*fp32", **sizes, **adagrad},
            shape,
        ),
    ]
