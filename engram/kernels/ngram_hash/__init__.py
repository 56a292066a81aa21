"""Hash ids of the n-grams that end at each token, for all memory layers at once (Engram, equations 1-2)."""

from typing import Literal

import torch

from engram.kernels.ngram_hash.reference import ngram_hash_ref


def ngram_hash(
    compressed_ids: torch.Tensor,
    document_ids: torch.Tensor | None,
    multipliers: torch.Tensor,
    primes: torch.Tensor,
    offsets: torch.Tensor | None,
    *,
    pad_id: int,
    stop_at_pad: bool,
    impl: Literal["auto", "reference"] = "auto",
) -> torch.Tensor:
    """z[l,t,n,h] = (x[t] m[l,0] ^ x[t-1] m[l,1] ^ ... ^ x[t-n+1] m[l,n-1]) mod p[l,n,h]  (+ offset[l,n,h])

    All tensors int64. `compressed_ids`, `document_ids` [B, T]; `multipliers` [L, N] (every product below 2^63);
    `primes` [L, N-1, H]; `offsets` [L, (N-1)*H] or None. Returns [L, B, T, (N-1)*H], orders outermost.

    Look-back that meets the start of the row, a negative (dead) id, another document (if `document_ids` are given) or
    the pad id (if `stop_at_pad`) reads `pad_id` there and at all older positions. A dead token itself gets -1 in all
    columns.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"ngram_hash has no implementation {impl!r}: choose 'auto' or 'reference'")
    if compressed_ids.dtype != torch.int64:
        raise TypeError(f"ngram_hash needs int64 ids, got {compressed_ids.dtype}: hashing is exact in int64 only")
    return ngram_hash_ref(
        compressed_ids, document_ids, multipliers, primes, offsets, pad_id=pad_id, stop_at_pad=stop_at_pad
    )
