"""Rows of different lengths as batches: padded on the right, where a causal model cannot see it.

Padding on the left would stand inside the n-grams' windows and change what the memory is asked for.

Legend: B rows, T tokens of the longest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """`tokens_BT` int64 and `real_BT` bool (False: padding); `indices` are the rows' places in the caller's list."""

    indices: list[int]
    tokens_BT: Tensor
    real_BT: Tensor


def padded_batches(
    rows: Sequence[Sequence[int]], max_tokens: int, device: torch.device | str = "cpu", pad_id: int = 0
) -> Iterator[PaddedBatch]:
    """All rows, the longest first, in batches of at most `max_tokens` tokens with their padding (one row at least).

    Rows of like length share a batch, so little is padded; the order depends on lengths and places alone.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    start = 0
    while start < len(order):
        width = len(rows[order[start]])
        indices = order[start : start + max(1, max_tokens // max(1, width))]
        chosen = [rows[index] for index in indices]
        lengths_B1 = torch.tensor([[len(row)] for row in chosen])
        real_BT = torch.arange(width) < lengths_B1
        yield PaddedBatch(indices, pad_right(chosen, device, pad_id), real_BT.to(device))
        start += len(indices)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", pad_id: int = 0) -> Tensor:
    """The rows as int64 [B, T], T the longest row's tokens."""
    tokens_BT = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens_BT.to(device)
