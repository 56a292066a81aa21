"""Backward kernels of the routed experts; every sum has a fixed order.

The routing weight's gradient is <dy, down act> = <down^T dy, act>: it falls out of the activation's gradient, so the
experts' outputs are neither kept nor computed again.

Legend: T tokens, K experts per token, N = T K rows sorted by expert, D hidden, F expert width, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.moe_experts.triton_forward import STAGES, Tile, combine, inner_of, product, tile_of
from engram.kernels.moe_experts.triton_routing import Routing, num_tiles


@triton.jit
def _activation_kernel(
    dy_ptr, down_ptr, weights_ptr, gate_up_ptr, choice_of_row_ptr, starts_ptr, tiles_ptr,
    dgate_up_ptr, act_ptr, dweights_ptr,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dgate_up [N, 2, F]; the activation times its routing weight [N, F]; the weight's gradient [N, column tiles]."""
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + 2 * tile + 1)
    row = tl.arange(0, ROWS)
    alive = first + row < tl.load(starts_ptr + expert + 1)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < WIDTH
    inner = tl.arange(0, INNER)
    choice = tl.load(choice_of_row_ptr + first + row, mask=alive, other=0)
    dy_ptrs = dy_ptr + (choice // TOP_K).to(tl.int64)[:, None] * HIDDEN + inner[None, :]
    down_ptrs = down_ptr + expert.to(tl.int64) * (HIDDEN * WIDTH) + columns[None, :] + inner[:, None] * WIDTH
    dact = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, HIDDEN, INNER):
        down = tl.load(down_ptrs, mask=exists[None, :], other=0.0)
        dact = tl.dot(tl.load(dy_ptrs), down, dact, input_precision="ieee")
        dy_ptrs += INNER
        down_ptrs += INNER * WIDTH

    mask = alive[:, None] & exists[None, :]
    place = row[:, None] * (2 * WIDTH) + columns[None, :]
    gate_up_ptr += first.to(tl.int64) * (2 * WIDTH)
    dgate_up_ptr += first.to(tl.int64) * (2 * WIDTH)
    act_ptr += first.to(tl.int64) * WIDTH
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + choice, mask=alive, other=0.0)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(
        dweights_ptr + choice.to(tl.int64) * column_tiles + column_tile, tl.sum(dact * silu * up, axis=1), mask=alive
    )
    tl.store(act_ptr + row[:, None] * WIDTH + columns[None, :], weight * silu * up, mask=mask)
    dact *= weight
    tl.store(dgate_up_ptr + place, dact * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    tl.store(dgate_up_ptr + place + WIDTH, dact * silu, mask=mask)


@triton.jit
def _weight_gradient_kernel(
    a_ptr, b_ptr, choice_of_row_ptr, starts_ptr, out_ptr,
    TOP_K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHER_A: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[e] [HEIGHT, WIDTH] = sum over e's rows of a^T b; one of the two belongs to tokens and is gathered."""
    row_tile = tl.program_id(0) % ((HEIGHT + ROWS - 1) // ROWS)
    column_tile = tl.program_id(0) // ((HEIGHT + ROWS - 1) // ROWS)
    expert = tl.program_id(1).to(tl.int64)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_exists = rows < HEIGHT
    column_exists = columns < WIDTH
    end = tl.load(starts_ptr + expert + 1)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.load(starts_ptr + expert), end, INNER):
        inner = first + tl.arange(0, INNER)
        alive = inner < end
        token = (tl.load(choice_of_row_ptr + inner, mask=alive, other=0) // TOP_K).to(tl.int64)
        a_row = token if GATHER_A else inner.to(tl.int64)
        b_row = inner.to(tl.int64) if GATHER_A else token
        a_ptrs = a_ptr + a_row[:, None] * HEIGHT + rows[None, :]
        b_ptrs = b_ptr + b_row[:, None] * WIDTH + columns[None, :]
        a = tl.load(a_ptrs, mask=alive[:, None] & row_exists[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=alive[:, None] & column_exists[None, :], other=0.0)
        out = tl.dot(tl.trans(a), b, out, input_precision="ieee")
    place = (expert * HEIGHT + rows)[:, None] * WIDTH + columns[None, :]
    tl.store(out_ptr + place, out, mask=row_exists[:, None] & column_exists[None, :])


def backward(
    dy: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kept: Tensor, routing: Routing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down from what `forward` kept. All contiguous."""
    num_experts, hidden, width = down.shape
    num_rows, top_k = weights.numel(), weights.shape[1]
    tile = tile_of(num_rows, num_experts, x.dtype)
    # The epilogue holds five blocks at once: half the columns keep them in registers.
    columns = tile.columns // 2
    column_tiles = triton.cdiv(width, columns)
    dgate_up = torch.empty_like(kept)
    act = x.new_empty(num_rows, width)
    # A choice outside [0, E) has no row, and a gradient of zero.
    dweights = weights.new_zeros(num_rows, column_tiles)
    _activation_kernel[(num_tiles(num_rows, num_experts, tile.rows) * column_tiles,)](
        dy, down, weights, kept, routing.choice_of_row, routing.starts, routing.tiles, dgate_up, act, dweights,
        top_k, hidden, width, tile.rows, columns, inner_of(hidden, x.dtype),
        num_warps=tile.num_warps, num_stages=STAGES,
    )  # fmt: skip
    dx = combine(product(dgate_up.flatten(1), gate_up, routing, tile, transposed=False), routing, top_k, None)
    return (
        dx,
        dweights.sum(1).view_as(weights),
        _weight_gradient(dgate_up.flatten(1), x, routing, top_k, gather_a=False).view_as(gate_up),
        _weight_gradient(dy, act, routing, top_k, gather_a=True),
    )


def _weight_gradient(a: Tensor, b: Tensor, routing: Routing, top_k: int, *, gather_a: bool) -> Tensor:
    height, width, num_experts = a.shape[1], b.shape[1], len(routing.starts) - 1
    tile = _gradient_tile(a.dtype)
    out = a.new_empty(num_experts, height, width)
    _weight_gradient_kernel[(triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns), num_experts)](
        a, b, routing.choice_of_row, routing.starts, out, top_k, height, width, gather_a,
        tile.rows, tile.columns, 64 if a.dtype.itemsize == 2 else 16,
        num_warps=tile.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return out


def _gradient_tile(dtype: torch.dtype) -> Tile:
    """As in `tile_of`, but what is tiled has the fixed size of a matrix, and tokens are summed over."""
    return Tile(64, 64, num_warps=4) if dtype == torch.float32 else Tile(128, 128, num_warps=8)
