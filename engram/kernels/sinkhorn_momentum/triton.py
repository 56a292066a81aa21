"""Momentum with Sinkhorn balancing on GPUs: a kernel for the momentum, one for each sweep, one for the update.

Balancing never rewrites the matrix H. With A its elementwise square, row^2 = 1 / (A column^2) normalises rows and
column^2 = 1 / (A^T row^2) columns, so that a sweep does both, and skips inactive rows. H is stored for rows with a
gradient only: elsewhere it is beta times the momentum. Column sums are partial sums of a fixed number of programs.

Legend: R rows of the table, U rows with a gradient, D width of a row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.compile_ahead import Build
from engram.kernels.table_update.triton import as_int32, as_stored, load_rows, store_rows, tile_shape

# Programs of a sweep: enough for any GPU, few enough that adding up their column sums is nothing.
PROGRAMS = 1024
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _tile(first, num_rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers, which of them exist, columns, and the mask and offsets of their entries."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    return row, row < num_rows, columns, (columns < D)[None, :], row[:, None] * D + columns[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _momentum_kernel(
    momentum,
    gradient,
    slots,
    lookahead,
    norms,
    num_rows,
    beta,
    rise,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, live, columns, inside, at = _tile(tl.program_id(0).to(tl.int64) * ROWS, num_rows, D, COLUMNS, ROWS)
    slot = tl.load(slots + row, mask=live, other=-1).to(tl.int64)
    touched = (slot >= 0)[:, None] & inside
    source = slot[:, None] * D + columns[None, :]
    step = rise * load_rows(gradient + source, touched)
    m = beta * tl.load(momentum + at, mask=live[:, None] & inside, other=0.0) + step
    tl.store(momentum + at, m, mask=live[:, None] & inside)
    h = beta * m + step
    tl.store(lookahead + source, h, mask=touched)
    # Divided by the largest entry, so that no square underflows.
    largest = tl.maximum(tl.max(tl.abs(h), axis=1), _TINY)
    h = h / largest[:, None]
    tl.store(norms + row, largest * tl.sqrt(tl.sum(h * h, axis=1)), mask=live)


@triton.jit
def _load_lookahead(momentum, lookahead, slots, row, active, at, columns, inside, beta, scale, D: tl.constexpr):
    """H times `scale` on active rows, zeros elsewhere."""
    slot = tl.load(slots + row, mask=active, other=-1).to(tl.int64)
    touched = slot >= 0
    resting = (active & (slot < 0))[:, None] & inside
    h = beta * tl.load(momentum + at, mask=resting, other=0.0)
    h += tl.load(lookahead + slot[:, None] * D + columns[None, :], mask=touched[:, None] & inside, other=0.0)
    return h * scale


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _sweep_kernel(
    momentum,
    lookahead,
    slots,
    norms,
    limits,
    column_squares,
    part_sums,
    num_rows,
    rows_each,
    beta,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalises rows, and sums the columns of a program's rows. `limits` = (largest norm of inactive rows, scale)."""
    program = tl.program_id(0).to(tl.int64)
    cutoff, scale = tl.load(limits), tl.load(limits + 1)
    lane = tl.arange(0, COLUMNS)
    column = tl.load(column_squares + lane, mask=lane < D, other=0.0)
    total = tl.zeros((COLUMNS,), tl.float32)
    begin = program * rows_each
    for first in range(begin, tl.minimum(begin + rows_each, num_rows), ROWS):
        row, live, columns, inside, at = _tile(first, num_rows, D, COLUMNS, ROWS)
        active = tl.load(norms + row, mask=live, other=0.0) > cutoff
        h = _load_lookahead(momentum, lookahead, slots, row, active, at, columns, inside, beta, scale, D)
        squares = tl.sum(h * h * column[None, :], axis=1)
        row_square = tl.where(squares < _TINY, 0.0, 1 / tl.maximum(squares, _TINY))
        total += tl.sum(h * h * row_square[:, None], axis=0)
    tl.store(part_sums + program * D + lane, total, mask=lane < D)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def _apply_kernel(
    table,
    momentum,
    lookahead,
    slots,
    norms,
    limits,
    column_squares,
    num_rows,
    seed,
    beta,
    step,
    keep,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, live, columns, inside, at = _tile(tl.program_id(0).to(tl.int64) * ROWS, num_rows, D, COLUMNS, ROWS)
    cutoff, scale = tl.load(limits), tl.load(limits + 1)
    active = tl.load(norms + row, mask=live, other=0.0) > cutoff
    column = tl.load(column_squares + columns, mask=columns < D, other=0.0)
    h = _load_lookahead(momentum, lookahead, slots, row, active, at, columns, inside, beta, scale, D)
    squares = tl.sum(h * h * column[None, :], axis=1)
    size = tl.where(squares < _TINY, 0.0, step / tl.sqrt(tl.maximum(squares, _TINY)))
    update = size[:, None] * h * tl.sqrt(column)[None, :]
    inside = active[:, None] & inside
    store_rows(table + at, keep * load_rows(table + at, inside) - update, row, columns, seed, inside)


def sinkhorn_momentum_triton_(
    table: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    *,
    lr: float,
    beta: float,
    steps: int,
    threshold: float,
    update_rms: float,
    weight_decay: float,
    seed: int,
) -> None:
    (num_rows, width), device = table.shape, table.device
    shape = tile_shape(width)
    tiles = triton.cdiv(num_rows, shape["ROWS"])
    if not tiles:
        return
    # Where a row's gradient and its H lie, -1 for rows without.
    slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    slots.index_copy_(0, rows, torch.arange(len(rows), dtype=torch.int32, device=device))
    lookahead, norms = torch.empty(len(rows), width, device=device), torch.empty(num_rows, device=device)
    _momentum_kernel[(tiles,)](
        momentum, as_stored(gradient), slots, lookahead, norms, num_rows, beta, 1 - beta, **shape
    )
    tiny = torch.finfo(torch.float32).tiny
    # The scale cancels in every normalisation, and keeps squares of small gradients from underflowing.
    limits = torch.stack((threshold * norms.mean(), norms.max().clamp_min(tiny).reciprocal()))
    columns = torch.ones(width, device=device)
    matrix = (momentum, lookahead, slots, norms, limits)
    rows_each = triton.cdiv(tiles, PROGRAMS) * shape["ROWS"]
    programs = triton.cdiv(num_rows, rows_each)
    part_sums = torch.empty(programs, width, device=device)
    for _ in range(steps // 2):
        _sweep_kernel[(programs,)](*matrix, columns, part_sums, num_rows, rows_each, beta, **shape)
        sums = part_sums.sum(0)
        columns = torch.where(sums < tiny, 0, 1 / sums)
    step = lr * update_rms * math.sqrt(width)
    settings = (num_rows, as_int32(seed), beta, step, 1 - lr * weight_decay)
    _apply_kernel[(tiles,)](as_stored(table), *matrix, columns, *settings, **shape)


def builds() -> list[Build]:
    """Rows of the small configs (16), of Engram-27B (80) and of V4.1 (256)."""
    return [build for width in (16, 80, 256) for stored in ("fp32", "i16") for build in _builds(width, stored)]


def _builds(width: int, stored: str) -> list[Build]:
    shape: dict[str, Any] = tile_shape(width)
    label = f"{width} {stored}"
    matrix = {"momentum": "*fp32", "lookahead": "*fp32", "slots": "*i32", "norms": "*fp32", "limits": "*fp32"}
    momentum = {"momentum": "*fp32", "gradient": f"*{stored}", "slots": "*i32", "lookahead": "*fp32", "norms": "*fp32"}
    sweep = {**matrix, "column_squares": "*fp32", "part_sums": "*fp32", "num_rows": "i32", "rows_each": "i32"}
    update = {"table": f"*{stored}", **matrix, "column_squares": "*fp32", "num_rows": "i32", "seed": "i32"}
    return [
        Build(
            f"momentum {label}",
            _momentum_kernel,
            {**momentum, "num_rows": "i32", "beta": "fp32", "rise": "fp32"},
            shape,
        ),
        Build(f"sweep {width}", _sweep_kernel, {**sweep, "beta": "fp32"}, shape),
        Build(f"apply {label}", _apply_kernel, {**update, **dict.fromkeys(("beta", "step", "keep"), "fp32")}, shape),
    ]
