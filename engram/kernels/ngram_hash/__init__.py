"""Hash ids of the n-grams that end at each token, for all memory layers at once (Engram, equations 1-2).

Letters: B batch, T tokens, L memory layers, N longest n-gram, H heads of one order, C = (N-1)*H columns, V token ids.
"""

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, check_integers, choose, triton_obstacle
from engram.kernels.native import native_obstacle
from engram.kernels.ngram_hash.native_cpu import LONGEST_NGRAM, SOURCE, ngram_hash_native
from engram.kernels.ngram_hash.reference import check_token_ids, ngram_hash_ref

__all__ = ["check_recipe", "check_tokens", "ngram_hash", "ngram_hash_ref"]


def ngram_hash(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    *,
    pad_id: int,
    stop_at_pad: bool,
    token_map: Tensor | None = None,
    checked: bool | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """z[l,t,n,h] = (x[t] m[l,0] ^ x[t-1] m[l,1] ^ ... ^ x[t-n+1] m[l,n-1]) mod p[l,n,h]  (+ offset[l,n,h])

    All tensors int64. `ids`, `document_ids` [B, T]; `multipliers` [L, N] (every product below 2^63); `primes`
    [L, N-1, H], each at least 2; `offsets` [L, C] or None. Returns [L, B, T, C], orders outermost. The x are `ids`, or
    token_map[ids] if `token_map` [V] is given.

    Look-back that meets the start of the row, a negative (dead) id, another document (if `document_ids` are given) or
    the pad id (if `stop_at_pad`) reads `pad_id`, which is an x, there and at all older positions. A dead token itself
    gets -1 in all columns.

    `checked` (default: on CPU) raises IndexError for an id from V on; on CUDA this waits for the device. Unchecked,
    such an id counts as dead.
    """
    check_tokens(ids, document_ids, token_map, pad_id)
    check_recipe(multipliers, primes, offsets, ids.device, leading=1)
    device = ids.device.type
    chosen = _choice(impl, device)
    checked = device == "cpu" if checked is None else checked
    return torch.ops.engram.ngram_hash(
        ids, document_ids, multipliers, primes, offsets, token_map, pad_id, stop_at_pad, checked, chosen
    )


@torch.library.custom_op("engram::ngram_hash", mutates_args=())
def _ngram_hash(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    token_map: Tensor | None,
    pad_id: int,
    stop_at_pad: bool,
    checked: bool,
    impl: str,
) -> Tensor:
    ids = ids.contiguous()
    # On CUDA, looking would wait for the device.
    if primes.device.type == "cpu" and primes.numel() and (smallest := int(primes.min())) < 2:
        raise ValueError(f"a head has {smallest} rows: primes must be at least 2")
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    if impl == "native":
        out, beyond = ngram_hash_native(ids, document_ids, multipliers, primes, offsets, token_map, pad_id, stop_at_pad)
        if beyond and checked and token_map is not None:
            check_token_ids(ids, token_map)
        return out
    if checked and token_map is not None:
        check_token_ids(ids, token_map)
    if impl == "triton":
        from engram.kernels.ngram_hash.triton import ngram_hash_triton

        with torch.cuda.device_of(ids):
            return ngram_hash_triton(ids, document_ids, multipliers, primes, offsets, token_map, pad_id, stop_at_pad)
    return ngram_hash_ref(
        ids, document_ids, multipliers, primes, offsets, pad_id=pad_id, stop_at_pad=stop_at_pad, token_map=token_map
    )


@_ngram_hash.register_fake
def _(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    token_map: Tensor | None,
    pad_id: int,
    stop_at_pad: bool,
    checked: bool,
    impl: str,
) -> Tensor:
    layers, orders, heads = primes.shape
    return ids.new_empty(layers, *ids.shape, orders * heads)


@torch.compiler.assume_constant_result
def _choice(impl: str, device: str) -> str:
    return choose("ngram_hash", impl, device, triton=lambda: triton_obstacle(device), native=lambda: _obstacle(device))


def _obstacle(device: str) -> str | None:
    return native_obstacle(SOURCE) if device == "cpu" else f"the tensors are on {device}: native code is for CPU"


def check_tokens(ids: Tensor, document_ids: Tensor | None, token_map: Tensor | None, pad_id: int) -> None:
    """Raises TypeError or ValueError where tokens and what belongs to them do not fit together."""
    for name, tensor in (("ids", ids), ("document_ids", document_ids), ("token_map", token_map)):
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}: hashing is exact in int64 only")
        if tensor is not None and tensor.device != ids.device:
            raise ValueError(f"{name} is on {tensor.device}, but ids are on {ids.device}")
    if ids.ndim != 2:
        raise ValueError(f"ids must be [batch, tokens], got {list(ids.shape)}")
    if document_ids is not None and document_ids.shape != ids.shape:
        raise ValueError(f"document_ids {list(document_ids.shape)} must have the shape of ids, {list(ids.shape)}")
    if token_map is not None and (token_map.ndim != 1 or not len(token_map) or not token_map.is_contiguous()):
        raise ValueError(f"token_map must be contiguous, one entry for each token id, got {list(token_map.shape)}")
    check_integers("hashing", pad_id=pad_id)
    if pad_id < 0:
        raise ValueError(f"pad_id is {pad_id}: it must be an id, 0 or more")


def check_recipe(
    multipliers: Tensor, primes: Tensor, offsets: Tensor | None, device: torch.device, *, leading: int
) -> None:
    """Raises TypeError or ValueError where the constants of a hash do not fit together; `leading` dimensions are L."""
    for name, tensor in (("multipliers", multipliers), ("primes", primes), ("offsets", offsets)):
        if tensor is None:
            continue
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}: hashing is exact in int64 only")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the ids are, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    layers, longest = multipliers.shape[:-1], multipliers.shape[-1]
    if multipliers.ndim != leading + 1 or not 2 <= longest <= LONGEST_NGRAM:
        raise ValueError(f"multipliers {list(multipliers.shape)} must end in n-gram sizes of 2 to {LONGEST_NGRAM}")
    if primes.ndim != leading + 2 or primes.shape[:-1] != (*layers, longest - 1) or not primes.shape[-1]:
        raise ValueError(f"primes {list(primes.shape)} must be {[*layers, longest - 1]} times the number of heads")
    if offsets is not None and offsets.shape != (*layers, (longest - 1) * primes.shape[-1]):
        raise ValueError(f"offsets {list(offsets.shape)} must have one entry for each of primes {list(primes.shape)}")
