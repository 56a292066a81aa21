"""The rows that a table starts with, drawn in slices: the same as torch draws for the whole table at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Torch draws in blocks of 16 numbers, and the last 16 of a tensor anew where its size is no multiple of them. Slices of
# multiples of 16 rows, the last of 16 rows at least, are therefore drawn as the whole is.
BLOCK = 16
ROWS_AT_ONCE = 2**16


def initial_rows(
    num_rows: int, width: int, std: float, dtype: torch.dtype, keep: range, at_once: int = ROWS_AT_ONCE
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, width] of N(0, std)) of each slice of the rows `keep`, of a table of `num_rows`.

    Draws for all rows, from torch's CPU generator: who keeps others leaves it in the same state.
    """
    assert at_once % BLOCK == 0
    row = 0
    while row < num_rows:
        count = at_once if num_rows - row >= at_once + BLOCK else num_rows - row
        drawn = torch.empty(count, width, dtype=dtype).normal_(std=std)
        first, stop = max(row, keep.start), min(row + count, keep.stop)
        if first < stop:
            yield first, drawn[first - row : stop - row]
        row += count


def draw_own(rows: Tensor, num_rows: int, std: float, own: range) -> None:
    """Leave in `rows` what N(0, std) gives the rows `own` of a table of `num_rows`."""
    for first, drawn in initial_rows(num_rows, rows.shape[1], std, rows.dtype, own):
        rows[first - own.start : first - own.start + len(drawn)] = drawn
