"""A stable count-sort of choices by expert on the device, and the tiles of rows that grouped products run over.

The host never learns how many tokens an expert got: it launches as many tiles as any routing could need, and those
behind the last one return at once.

Legend: N = T K choices (token t's k-th is t K + k), E experts, M tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Choices that one program sorts: thousands of tokens make tens of programs, and as few rows of counts to scan.
CHUNK = 1024
# Elements of one one-hot block [choices, experts]: 16 a thread, since several such blocks live at once.
BLOCK = 2048
# Rows of the smallest tile, for which the list of tiles has room.
SMALLEST_TILE = 16


class Routing(NamedTuple):
    """Rows are choices sorted by expert; a choice outside [0, E) has no row. All int32."""

    # [N] choice of each row, [N] row of each choice (-1: none), [E + 1] first row of each expert.
    choice_of_row: Tensor
    row_of_choice: Tensor
    starts: Tensor
    # [M, 2] expert and first row of each tile; expert -1: nothing to do.
    tiles: Tensor


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, num_choices, PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    chunk = tl.program_id(0)
    experts = tl.arange(0, PADDED)
    counts = tl.zeros((PADDED,), tl.int32)
    for step in range(0, CHUNK, STEP):
        choices = chunk * CHUNK + step + tl.arange(0, STEP)
        ids = tl.load(ids_ptr + choices, mask=choices < num_choices, other=-1)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * PADDED + experts, counts)


@triton.jit
def _scan_kernel(
    counts_ptr, starts_ptr, tiles_ptr, num_chunks, num_tiles,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Counts become, in place, the choices of the same expert in earlier chunks."""
    experts = tl.arange(0, PADDED)
    totals = tl.zeros((PADDED,), tl.int32)
    for first in range(0, num_chunks, STEP):
        chunks = first + tl.arange(0, STEP)
        pointers = counts_ptr + chunks[:, None] * PADDED + experts[None, :]
        inside = (chunks < num_chunks)[:, None]
        counts = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, totals[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        totals += tl.sum(counts, axis=0)
    ends = tl.cumsum(totals, 0)
    starts = ends - totals
    tl.store(starts_ptr + experts, starts, mask=experts < EXPERTS)
    tl.store(starts_ptr + experts + 1, ends, mask=experts == EXPERTS - 1)

    tile_counts = (totals + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tile_counts, 0)
    # A tile's first row, less the rows that all tiles before it would hold if they were full.
    shift = starts - (tile_ends - tile_counts) * ROWS
    for first in range(0, num_tiles, STEP):
        tiles = first + tl.arange(0, STEP)
        expert = tl.sum((tile_ends[None, :] <= tiles[:, None]).to(tl.int32), axis=1)
        own = experts[None, :] == expert[:, None]
        row = tiles * ROWS + tl.sum(tl.where(own, shift[None, :], 0), axis=1)
        inside = tiles < num_tiles
        tl.store(tiles_ptr + 2 * tiles, tl.where(expert < EXPERTS, expert, -1), mask=inside)
        tl.store(tiles_ptr + 2 * tiles + 1, row, mask=inside)


@triton.jit
def _place_kernel(
    ids_ptr, counts_ptr, starts_ptr, choice_of_row_ptr, row_of_choice_ptr, num_choices,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    experts = tl.arange(0, PADDED)
    next_row = tl.load(starts_ptr + experts, mask=experts < EXPERTS, other=0)
    next_row += tl.load(counts_ptr + chunk * PADDED + experts)
    for step in range(0, CHUNK, STEP):
        choices = chunk * CHUNK + step + tl.arange(0, STEP)
        inside = choices < num_choices
        ids = tl.load(ids_ptr + choices, mask=inside, other=-1)
        chosen = (ids[:, None] == experts[None, :]).to(tl.int32)
        row = tl.sum(chosen * (next_row[None, :] + tl.cumsum(chosen, 0) - 1), axis=1)
        alive = (ids >= 0) & (ids < EXPERTS)
        tl.store(choice_of_row_ptr + row, choices, mask=alive)
        tl.store(row_of_choice_ptr + choices, tl.where(alive, row, -1), mask=inside)
        next_row += tl.sum(chosen, axis=0)


def allocate(ids_TK: Tensor, num_experts: int) -> Routing:
    num_choices = ids_TK.numel()
    return Routing(
        choice_of_row=ids_TK.new_empty(num_choices, dtype=torch.int32),
        row_of_choice=ids_TK.new_empty(num_choices, dtype=torch.int32),
        starts=ids_TK.new_empty(num_experts + 1, dtype=torch.int32),
        tiles=ids_TK.new_empty(num_tiles(num_choices, num_experts, SMALLEST_TILE), 2, dtype=torch.int32),
    )


def num_tiles(num_choices: int, num_experts: int, tile_rows: int) -> int:
    """As many as any routing needs: every expert may end in a partial tile."""
    return num_choices // tile_rows + num_experts


def route(ids_TK: Tensor, num_experts: int, tile_rows: int) -> Routing:
    """Sort the choices `ids_TK` int64 (contiguous, at least one) and cut each expert's rows into tiles."""
    num_choices = ids_TK.numel()
    routing = allocate(ids_TK, num_experts)
    choice_of_row, row_of_choice, starts, tiles = routing
    padded = triton.next_power_of_2(num_experts)
    step = min(max(BLOCK // padded, 1), CHUNK)
    num_chunks = triton.cdiv(num_choices, CHUNK)
    counts = ids_TK.new_empty(num_chunks, padded, dtype=torch.int32)
    _count_kernel[(num_chunks,)](ids_TK, counts, num_choices, padded, CHUNK, step)
    _scan_kernel[(1,)](
        counts, starts, tiles, num_chunks, num_tiles(num_choices, num_experts, tile_rows),
        num_experts, padded, step, tile_rows,
    )  # fmt: skip
    _place_kernel[(num_chunks,)](
        ids_TK, counts, starts, choice_of_row, row_of_choice, num_choices, num_experts, padded, CHUNK, step
    )
    return routing
