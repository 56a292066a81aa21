"""Momentum with Sinkhorn balancing in C++ for CPUs, with all of torch's threads."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library

SOURCE = Path(__file__).with_name("native.cpp")
# Parts of the active rows whose column sums are kept apart, as in the source.
PARTS = 1024


class _Momentum(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("momentum", "lookahead", "touched")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_touched")),
        ("beta", ctypes.c_float),
    ]


def sinkhorn_momentum_native_(
    table: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    *,
    lr: float,
    beta: float,
    steps: int,
    threshold: float,
    update_rms: float,
    weight_decay: float,
    seed: int,
) -> None:
    (num_rows, width), touched = table.shape, len(rows)
    lookahead, norms = torch.empty(touched, width), torch.empty(num_rows)
    active, part_sums = torch.empty(num_rows, dtype=torch.int64), torch.empty(PARTS, width, dtype=torch.float64)
    pointers = (each.data_ptr() for each in (momentum, lookahead, rows))
    state = _Momentum(*pointers, num_rows, width, touched, beta)
    load_library(SOURCE).sinkhorn_momentum(
        ctypes.byref(state),
        *_typed(gradient),
        *_typed(table),
        *(ctypes.c_void_p(each.data_ptr()) for each in (norms, active, part_sums)),
        ctypes.c_int32(steps),
        ctypes.c_double(threshold),
        ctypes.c_double(lr * update_rms * math.sqrt(width)),
        ctypes.c_double(1 - lr * weight_decay),
        ctypes.c_uint32(seed),
    )


def _typed(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_bool]:
    return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_bool(tensor.dtype == torch.bfloat16)
