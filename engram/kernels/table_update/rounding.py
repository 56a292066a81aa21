"""Stochastic rounding to bfloat16 from an integer hash of (seed, row, column), the same in every implementation.

Legend: U rows, D width of a row.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Weyl step (2^32 over the golden ratio): neighbouring columns start far apart.
COLUMN_STEP = 0x9E3779B9
# Multipliers of the two-round mixer with the least known bias (Wellons' search over 32-bit permutations).
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B


def round_stochastically(values_UD: Tensor, seed: int, rows_U: Tensor) -> Tensor:
    """float32 [U, D] -> bfloat16: up with the probability of the part that is cut off, so that the mean is kept.

    0 <= seed < 2^32; `rows_U` int64 are the rows' numbers in the whole table. Infinity and NaN stay.
    """
    bits_UD = values_UD.view(torch.int32)
    rounded_UD = bits_UD + random_bits(seed, rows_U, values_UD.shape[1])
    rounded_UD = torch.where(values_UD.isfinite(), rounded_UD, bits_UD).masked_fill_(values_UD.isnan(), 0x7FC00000)
    # The upper half of the bits, since torch's own conversion has another NaN.
    return (rounded_UD >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(seed: int, rows_U: Tensor, width: int) -> Tensor:
    """16 bits for each entry: int32 [U, D]."""
    start = _mix(torch.tensor(seed & _MASK, device=rows_U.device))
    key_U = _mix(_mix(start ^ (rows_U & _MASK)) ^ (rows_U >> 32))
    columns_D = torch.arange(width, device=rows_U.device) * COLUMN_STEP
    return (_mix((key_U[:, None] + columns_D) & _MASK) >> 16).int()


def _mix(x: Tensor) -> Tensor:
    """A permutation of the integers below 2^32 (held in int64, whose products wrap) that spreads every bit to all."""
    x = x ^ (x >> 16)
    x = (x * MIX_1) & _MASK
    x = x ^ (x >> 15)
    x = (x * MIX_2) & _MASK
    return x ^ (x >> 16)
