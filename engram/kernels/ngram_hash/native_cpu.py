"""N-gram hashing in C++: exact remainders from vectors of doubles, on all of torch's threads."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library

SOURCE = Path(__file__).with_name("native.cpp")
LONGEST_NGRAM = 8


def ngram_hash_native(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    token_map: Tensor | None,
    pad_id: int,
    stop_at_pad: bool,
) -> tuple[Tensor, bool]:
    """Hash ids [L, B, T, C], and whether some id lies beyond the token map (it counts as dead)."""
    (layers, longest), (batch, length), heads = multipliers.shape, ids.shape, primes.shape[2]
    out = torch.empty(layers, batch, length, (longest - 1) * heads, dtype=torch.int64)
    offsets = torch.zeros_like(primes) if offsets is None else offsets
    inverses = torch.empty(primes.numel(), dtype=torch.float64)
    tensors = (ids, document_ids, token_map, multipliers, primes, offsets, inverses, out)
    assert all(tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu") for tensor in tensors)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    sizes = (0 if token_map is None else len(token_map), batch, length, pad_id)
    function = load_library(SOURCE).ngram_hash
    function.restype = ctypes.c_int64
    first_bad = function(
        *pointers,
        *map(ctypes.c_int64, sizes),
        *map(ctypes.c_int, (stop_at_pad, layers, longest, heads)),
    )
    return out, first_bad >= 0
