"""The specification of `gather_rows` and `engram_lookup` in plain torch, and the format of 8-bit rows.

Letters: R rows of the table, D width of a row, N ids.
"""

import torch
from torch import Tensor

from engram.kernels.ngram_hash.reference import ngram_hash_ref

SCALE_BLOCK = 32
LARGEST_E4M3 = 448.0


def gather_rows_ref(table: Tensor, ids: Tensor, *, scales: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """[..., H] -> [..., H*D] of `dtype`; ids outside the table, as -1, give zeros."""
    known_N = ((ids >= 0) & (ids < len(table))).flatten()
    rows_N = torch.where(known_N, ids.flatten(), 0)
    values_ND = _take(table, rows_N)
    if scales is not None:
        scale_ND = _take(scales.view(torch.float8_e8m0fnu), rows_N).float().repeat_interleave(SCALE_BLOCK, dim=1)
        values_ND = values_ND.float() * scale_ND
    values_ND = values_ND.to(dtype).masked_fill_(~known_N[:, None], 0)
    return values_ND.view(*ids.shape[:-1], ids.shape[-1] * table.shape[1])


def engram_lookup_ref(
    tokens: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    table: Tensor,
    *,
    pad_id: int,
    stop_at_pad: bool,
    token_map: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    recipe = multipliers[None], primes[None], offsets[None]
    ids = ngram_hash_ref(tokens, document_ids, *recipe, pad_id=pad_id, stop_at_pad=stop_at_pad, token_map=token_map)[0]
    return gather_rows_ref(table, ids, scales=scales, dtype=dtype), ids


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D], D a multiple of 32 -> float8_e4m3fn [R, D] and one float8_e8m0fnu scale for 32 values [R, D/32].

    value = e4m3 * scale. Scales are the least powers of two that keep the block within +-448, from 2^-126 on: engines
    disagree about the byte 0, so none is ever written (DeepSeek-V4.1's layout).
    """
    if table.ndim != 2 or table.shape[1] % SCALE_BLOCK:
        raise ValueError(f"rows of {list(table.shape)} cannot be cut into blocks of {SCALE_BLOCK} values")
    blocks = table.float().unflatten(1, (-1, SCALE_BLOCK))
    # largest = mantissa * 2^exponent with a mantissa in [1/2, 1), and 448 = 7/8 * 2^9.
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1))
    power = torch.where(mantissa > LARGEST_E4M3 / 512, exponent - 8, exponent - 9)
    power = torch.where(mantissa == 0, -126, power).clamp(-126, 127)
    values = torch.ldexp(blocks, -power[..., None]).flatten(1).to(torch.float8_e4m3fn)
    return values, (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def check_row_ids(ids: Tensor, num_rows: int) -> None:
    """Raises IndexError that names the first id beyond the table; on a GPU this waits for the device."""
    beyond = ids >= num_rows
    if beyond.any():
        position = beyond.nonzero()[0].tolist()
        raise IndexError(
            f"row id {int(ids[tuple(position)])} at {position} lies beyond the table, whose rows are 0 to "
            f"{num_rows - 1}"
        )


def _take(table: Tensor, rows_N: Tensor) -> Tensor:
    if table.dtype.itemsize > 1:
        return table.index_select(0, rows_N)
    return table.view(torch.uint8).index_select(0, rows_N).view(table.dtype)
