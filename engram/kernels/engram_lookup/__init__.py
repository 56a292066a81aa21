"""Rows of n-gram tables: gathered by ids, or hashed and gathered in one launch. Forward only.

Letters: B batch, T tokens, N longest n-gram, O = N-1 orders, H heads of one order, C = O*H columns, V token ids, R rows
of the table, D width of a row.
"""

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, choose, triton_obstacle, width_obstacle
from engram.kernels.engram_lookup import operators
from engram.kernels.engram_lookup.huge_pages import advise_huge_pages
from engram.kernels.engram_lookup.native_cpu import SOURCE
from engram.kernels.engram_lookup.reference import SCALE_BLOCK, engram_lookup_ref, gather_rows_ref, quantize_rows
from engram.kernels.native import native_obstacle
from engram.kernels.ngram_hash import check_recipe, check_tokens, ngram_hash

__all__ = ["advise_huge_pages", "engram_lookup", "engram_lookup_ref", "gather_rows", "gather_rows_ref", "quantize_rows"]

# What the Triton kernels hold in one tile.
WIDEST_ROW = 512


def gather_rows(
    table: Tensor,
    ids: Tensor,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    deduplicate: bool = False,
    checked: bool | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """out[..., h*D : (h+1)*D] = table[ids[..., h]] * scale; id -1 reads a row of zeros.

    `ids` int64 [..., H]; `table` [R, D] with contiguous rows: float32, bfloat16, or float8_e4m3fn with one power of two
    for 32 values (`scales` [R, D/32], float8_e8m0fnu or its bytes as uint8), decoded in float32. Returns [..., H*D] of
    `dtype`, float32 or bfloat16: that of the table unless given, bfloat16 for 8-bit tables. `out` is written and
    returned instead of a new tensor, which spares a large output its page faults. With ids on CUDA, table and scales
    may also lie in pinned host memory.

    `deduplicate` reads each distinct row once, which pays where rows are far away and often repeated; on CUDA it waits
    for the device. `checked` (default: on CPU) raises IndexError for an id from R on; on CUDA it waits, too.
    Unchecked, such an id reads zeros.

    There is no gradient, and asking for one raises RuntimeError: engram.memory.table.RowTable has it, by rows. Raises
    TypeError and ValueError for operands that do not fit together, ImplementationUnavailable.
    """
    dtype = _check_rows(table, scales, dtype, ids.device)
    if ids.dtype != torch.int64 or not ids.ndim:
        raise TypeError(f"ids must be int64 of one or more dimensions, got {ids.dtype} {list(ids.shape)}")
    checked = ids.device.type == "cpu" if checked is None else checked
    chosen = _choice("gather_rows", impl, ids.device.type, table.shape[1])
    if out is None:
        return operators.gather_rows(table, ids, scales, dtype, deduplicate, checked, chosen)
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "out cannot carry a gradient to the table, which asks for one: detach it, or gather under torch.no_grad()"
        )
    shape = (*ids.shape[:-1], ids.shape[-1] * table.shape[1])
    if out.shape != shape or out.dtype != dtype or out.device != ids.device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {dtype} {list(shape)} on {ids.device}, got {out.dtype} {list(out.shape)} on "
            f"{out.device}"
        )
    operators.gather_rows_out(table, ids, scales, out, deduplicate, checked, chosen)
    return out


def engram_lookup(
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
    dtype: torch.dtype | None = None,
    checked: bool | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """`ngram_hash` and `gather_rows` of one layer in one launch: rows [B, T, C*D] and ids int64 [B, T, C].

    `multipliers` [N], `primes` [O, H], `offsets` [C]; everything else as in these two. `checked` (default: on CPU)
    raises IndexError for a token id beyond the map and for a row beyond the table, where the recipe is not the table's;
    on CUDA this waits for the device. `native` is the two natives, one after the other: without launches there is
    nothing to save.

    It is for inference engines and offloaded tables, which own a recipe and a frozen table, perhaps in 8 bits or pinned
    host memory. Nothing in this package calls it. Training and decoding hash all layers in one launch before the first
    block, where a launch for each layer would gain nothing; and both read through engram.memory.table.RowTable, which
    has the gradient and alone knows where rows are stored.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(
            f"offsets are {offsets}, but one table holds the rows of all heads: give the first row of each, int64 [C] "
            "(ngram_hash alone does without)"
        )
    check_tokens(tokens, document_ids, token_map, pad_id)
    check_recipe(multipliers, primes, offsets, tokens.device, leading=0)
    dtype = _check_rows(table, scales, dtype, tokens.device)
    checked = tokens.device.type == "cpu" if checked is None else checked
    chosen = _choice("engram_lookup", impl, tokens.device.type, table.shape[1])
    if chosen == "triton":
        hashed = tokens, document_ids, multipliers, primes, offsets, token_map
        return operators.engram_lookup(*hashed, table, scales, dtype, pad_id, stop_at_pad, checked)
    ids = ngram_hash(
        tokens,
        document_ids,
        multipliers[None],
        primes[None],
        offsets[None],
        pad_id=pad_id,
        stop_at_pad=stop_at_pad,
        token_map=token_map,
        checked=checked,
        impl=chosen,
    )[0]
    return gather_rows(table, ids, scales=scales, dtype=dtype, checked=checked, impl=chosen), ids


@torch.compiler.assume_constant_result
def _choice(op: str, impl: str, device: str, width: int) -> str:
    return choose(
        op, impl, device, triton=lambda: _triton_obstacle(device, width), native=lambda: _native_obstacle(device)
    )


def _triton_obstacle(device: str, width: int) -> str | None:
    return width_obstacle("rows", width, most=WIDEST_ROW) or triton_obstacle(device)


def _native_obstacle(device: str) -> str | None:
    return native_obstacle(SOURCE) if device == "cpu" else f"the tensors are on {device}: native code is for CPU"


def _check_rows(table: Tensor, scales: Tensor | None, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The output's dtype; raises TypeError or ValueError where table and scales cannot be read."""
    eight_bit = table.dtype == torch.float8_e4m3fn
    if not eight_bit and table.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a table must be float32, bfloat16 or float8_e4m3fn, got {table.dtype}")
    if table.ndim != 2 or not table.numel() or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"a table must be [rows, width] with contiguous rows, got {list(table.shape)} with strides "
            f"{list(table.stride())}"
        )
    if eight_bit != (scales is not None):
        raise ValueError(f"scales belong to float8_e4m3fn tables, and to no other; the table is {table.dtype}")
    if scales is not None:
        blocks, rest = divmod(table.shape[1], SCALE_BLOCK)
        if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise TypeError(f"scales must be float8_e8m0fnu or uint8, got {scales.dtype}")
        if rest or scales.shape != (len(table), blocks) or not scales.is_contiguous():
            raise ValueError(
                f"scales must be contiguous, one for {SCALE_BLOCK} values: table {list(table.shape)}, scales "
                f"{list(scales.shape)}"
            )
    for name, tensor in (("table", table), ("scales", scales)):
        if tensor is None or tensor.device == device:
            continue
        if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.is_pinned():
            raise ValueError(f"{name} is on {tensor.device}, ids on {device}: only pinned host memory may differ")
    dtype = dtype or (torch.bfloat16 if eight_bit else table.dtype)
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"rows can be float32 or bfloat16, not {dtype}")
    return dtype
