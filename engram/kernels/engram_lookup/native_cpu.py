"""Rows gathered in C++: prefetched, converted on the way, and written past the caches where the output is large."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library

SOURCE = Path(__file__).with_name("native.cpp")


def gather_rows_native(table: Tensor, ids: Tensor, scales: Tensor | None, out: Tensor) -> bool:
    """Fills `out`, and says whether some id lies beyond the table (its row is zero)."""
    assert ids.is_contiguous() and out.is_contiguous()
    assert all(tensor is None or tensor.device.type == "cpu" for tensor in (table, ids, scales, out))
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (table, scales, ids, out)]
    sizes = (table.stride(0), 0 if scales is None else scales.stride(0), *table.shape, ids.numel())
    function = load_library(SOURCE).gather_rows
    function.restype = ctypes.c_int64
    types = (table.dtype.itemsize, out.dtype == torch.bfloat16)
    return function(*pointers, *map(ctypes.c_int64, sizes), *map(ctypes.c_int, types)) >= 0
