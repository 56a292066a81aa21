"""The registered operators behind `gather_rows` and `engram_lookup`, which compiled graphs hold as one node each."""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.engram_lookup.native_cpu import gather_rows_native
from engram.kernels.engram_lookup.reference import check_row_ids, gather_rows_ref
from engram.kernels.ngram_hash.reference import check_token_ids


@torch.library.custom_op("engram::gather_rows", mutates_args=())
def gather_rows(
    table: Tensor,
    ids: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    deduplicate: bool,
    checked: bool,
    impl: str,
) -> Tensor:
    out = ids.new_empty((*ids.shape[:-1], ids.shape[-1] * table.shape[1]), dtype=dtype)
    _fill(table, ids, scales, out, deduplicate, checked, impl)
    return out


@gather_rows.register_fake
def _(
    table: Tensor,
    ids: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    deduplicate: bool,
    checked: bool,
    impl: str,
) -> Tensor:
    return ids.new_empty((*ids.shape[:-1], ids.shape[-1] * table.shape[1]), dtype=dtype)


@torch.library.custom_op("engram::gather_rows_out", mutates_args=("out",))
def gather_rows_out(
    table: Tensor, ids: Tensor, scales: Tensor | None, out: Tensor, deduplicate: bool, checked: bool, impl: str
) -> None:
    _fill(table, ids, scales, out, deduplicate, checked, impl)


@torch.library.custom_op("engram::engram_lookup", mutates_args=())
def engram_lookup(
    tokens: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    token_map: Tensor | None,
    table: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    pad_id: int,
    stop_at_pad: bool,
    checked: bool,
) -> tuple[Tensor, Tensor]:
    from engram.kernels.engram_lookup.triton import engram_lookup_triton

    if checked and token_map is not None:
        check_token_ids(tokens, token_map)
    ids = tokens.new_empty(*tokens.shape, primes.numel())
    out = tokens.new_empty(*tokens.shape, primes.numel() * table.shape[1], dtype=dtype)
    tokens, documents = tokens.contiguous(), None if document_ids is None else document_ids.contiguous()
    recipe = multipliers, primes, offsets, token_map
    with torch.cuda.device_of(tokens):
        engram_lookup_triton(tokens, documents, *recipe, table, scales, ids, out, pad_id, stop_at_pad)
    # The kernel reads zeros there.
    if checked:
        check_row_ids(ids, len(table))
    return out, ids


@engram_lookup.register_fake
def _(
    tokens: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    token_map: Tensor | None,
    table: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    pad_id: int,
    stop_at_pad: bool,
    checked: bool,
) -> tuple[Tensor, Tensor]:
    rows = tokens.new_empty(*tokens.shape, primes.numel() * table.shape[1], dtype=dtype)
    return rows, tokens.new_empty(*tokens.shape, primes.numel())


def _refuse_gradient(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "gather_rows and engram_lookup have no gradient: read a table that is trained through "
        "engram.memory.table.RowTable, or detach it, or look up under torch.no_grad()"
    )


gather_rows.register_autograd(_refuse_gradient)
engram_lookup.register_autograd(_refuse_gradient)


def _fill(
    table: Tensor, ids: Tensor, scales: Tensor | None, out: Tensor, deduplicate: bool, checked: bool, impl: str
) -> None:
    if deduplicate:
        distinct, places = torch.unique(ids, return_inverse=True)
        if checked:
            check_row_ids(ids, len(table))
        rows = out.new_empty(len(distinct), table.shape[1])
        _fill(table, distinct[:, None], scales, rows, False, False, impl)
        _fill(rows, places, None, out, False, False, impl)
        return
    ids = ids.contiguous()
    if impl == "native":
        if gather_rows_native(table, ids, scales, out) and checked:
            check_row_ids(ids, len(table))
        return
    if checked:
        check_row_ids(ids, len(table))
    if impl == "triton":
        from engram.kernels.engram_lookup.triton import gather_rows_triton

        with torch.cuda.device_of(ids):
            gather_rows_triton(table, ids, scales, out)
    else:
        out.copy_(gather_rows_ref(table, ids, scales=scales, dtype=out.dtype))
