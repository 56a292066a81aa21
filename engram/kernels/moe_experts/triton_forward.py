"""Forward kernels of the routed experts: products of an expert's rows with its matrices, tile by tile.

Legend: T tokens, K experts per token, N = T K rows sorted by expert, D hidden, F expert width, E experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.moe_experts.triton_routing import SMALLEST_TILE, Routing, num_tiles, route

# Blocks of both factors on their way to a multiprocessor at once.
STAGES = 3


class Tile(NamedTuple):
    """One program's part of a product [rows, inner] x [inner, columns], and what it runs with."""

    rows: int
    columns: int
    num_warps: int


def tile_of(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """The tile of every product whose rows are tokens.

    Tensor cores want 128 x 128 and 8 warps, 64 sums a thread; where an expert's average share of tokens does not fill
    128 rows, smaller tiles waste less. Float32 runs without tensor cores, from registers: smaller.
    """
    share = triton.next_power_of_2(max(num_rows // num_experts, 1))
    rows = min(max(share, SMALLEST_TILE), 128)
    if dtype == torch.float32:
        return Tile(min(rows, 64), 64, num_warps=4)
    return Tile(rows, 128, num_warps=8 if rows == 128 else 4)


def inner_of(width: int, dtype: torch.dtype) -> int:
    """Summed elements at a time: 128 bytes, or what divides the width (a multiple of 16), so that nothing is masked."""
    return next(size for size in (64, 32, 16) if width % size == 0 and size * dtype.itemsize <= 128)


@triton.jit
def _gate_up_kernel(
    x_ptr, gate_up_ptr, choice_of_row_ptr, starts_ptr, tiles_ptr, gate_up_out_ptr, act_ptr,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """act [N, F] = silu(gate) * up with gate, up = gate_up[e] x[token], both also kept [N, 2, F] if SAVE."""
    # Columns run fastest: the matrices of one expert stay in the second cache level while its rows pass.
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + 2 * tile + 1)
    # Places are counted from the tile's first row, in 32 bits: half the registers of 64.
    row = tl.arange(0, ROWS)
    alive = first + row < tl.load(starts_ptr + expert + 1)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < WIDTH
    inner = tl.arange(0, INNER)
    # Rows behind the expert's end read token 0; what they compute is not stored.
    token = tl.load(choice_of_row_ptr + first + row, mask=alive, other=0) // TOP_K
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + inner[None, :]
    gate_ptrs = gate_up_ptr + expert.to(tl.int64) * (2 * WIDTH * HIDDEN) + columns[None, :] * HIDDEN + inner[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, HIDDEN, INNER):
        x = tl.load(x_ptrs)
        gate = tl.dot(x, tl.load(gate_ptrs, mask=exists[None, :], other=0.0), gate, input_precision="ieee")
        up_ptrs = gate_ptrs + WIDTH * HIDDEN
        up = tl.dot(x, tl.load(up_ptrs, mask=exists[None, :], other=0.0), up, input_precision="ieee")
        x_ptrs += INNER
        gate_ptrs += INNER
    mask = alive[:, None] & exists[None, :]
    act_ptr += first.to(tl.int64) * WIDTH
    tl.store(act_ptr + row[:, None] * WIDTH + columns[None, :], gate * tl.sigmoid(gate) * up, mask=mask)
    if SAVE:
        gate_up_out_ptr += first.to(tl.int64) * (2 * WIDTH)
        place = row[:, None] * (2 * WIDTH) + columns[None, :]
        tl.store(gate_up_out_ptr + place, gate, mask=mask)
        tl.store(gate_up_out_ptr + place + WIDTH, up, mask=mask)


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, starts_ptr, tiles_ptr, out_ptr,
    WIDTH: tl.constexpr, LENGTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out [N, WIDTH] = a [N, LENGTH] b[e], b [E, LENGTH, WIDTH], or [E, WIDTH, LENGTH] if TRANSPOSED."""
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + 2 * tile + 1)
    # Places are counted from the tile's first row, in 32 bits: half the registers of 64.
    row = tl.arange(0, ROWS)
    alive = first + row < tl.load(starts_ptr + expert + 1)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < WIDTH
    inner = tl.arange(0, INNER)
    a_ptrs = a_ptr + first.to(tl.int64) * LENGTH + row[:, None] * LENGTH + inner[None, :]
    b_ptrs = b_ptr + expert.to(tl.int64) * (WIDTH * LENGTH)
    if TRANSPOSED:
        b_ptrs = b_ptrs + columns[None, :] * LENGTH + inner[:, None]
    else:
        b_ptrs = b_ptrs + columns[None, :] + inner[:, None] * WIDTH
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, LENGTH, INNER):
        a = tl.load(a_ptrs, mask=alive[:, None], other=0.0)
        out = tl.dot(a, tl.load(b_ptrs, mask=exists[None, :], other=0.0), out, input_precision="ieee")
        a_ptrs += INNER
        b_ptrs += INNER if TRANSPOSED else INNER * WIDTH
    out_ptr += first.to(tl.int64) * WIDTH
    tl.store(out_ptr + row[:, None] * WIDTH + columns[None, :], out, mask=alive[:, None] & exists[None, :])


@triton.jit
def _combine_kernel(
    rows_ptr, row_of_choice_ptr, weights_ptr, out_ptr,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * rows[row of t's k-th choice], in float32 and in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < WIDTH
    out = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_ptr + token * TOP_K + k).to(tl.int64)
        part = tl.load(rows_ptr + row * WIDTH + columns, mask=exists & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights_ptr + token * TOP_K + k)
        out += part
    tl.store(out_ptr + token * WIDTH + columns, out, mask=exists)


def product(a: Tensor, b: Tensor, routing: Routing, tile: Tile, *, transposed: bool) -> Tensor:
    """Each row of `a` times the matrix of its expert."""
    length = a.shape[1]
    width = b[0].numel() // length
    out = a.new_empty(len(a), width)
    _product_kernel[(num_tiles(len(a), len(b), tile.rows) * triton.cdiv(width, tile.columns),)](
        a, b, routing.starts, routing.tiles, out, width, length, transposed,
        tile.rows, tile.columns, inner_of(length, a.dtype), num_warps=tile.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return out


def combine(rows: Tensor, routing: Routing, top_k: int, weights: Tensor | None) -> Tensor:
    """The sum of each token's rows, weighted if there are weights."""
    num_tokens, width = len(rows) // top_k, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    block = min(triton.next_power_of_2(width), 1024)
    _combine_kernel[(num_tokens, triton.cdiv(width, block))](
        rows, routing.row_of_choice, weights, out, top_k, width, block, weights is not None
    )
    return out


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, save: bool
) -> tuple[Tensor, Tensor, Routing]:
    """y [T, D]; the pre-activations gate and up [N, 2, F] if `save`, else empty; the routing. All contiguous."""
    num_experts, hidden, width = down.shape
    num_rows, top_k = ids.numel(), ids.shape[1]
    tile = tile_of(num_rows, num_experts, x.dtype)
    routing = route(ids, num_experts, tile.rows)
    act = x.new_empty(num_rows, width)
    kept = x.new_empty(num_rows if save else 0, 2, width)
    # Two sums side by side: half the columns each.
    columns = tile.columns // 2
    _gate_up_kernel[(num_tiles(num_rows, num_experts, tile.rows) * triton.cdiv(width, columns),)](
        x, gate_up, routing.choice_of_row, routing.starts, routing.tiles, kept, act,
        top_k, hidden, width, tile.rows, columns, inner_of(hidden, x.dtype), save,
        num_warps=tile.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return combine(product(act, down, routing, tile, transposed=True), routing, top_k, weights), kept, routing
