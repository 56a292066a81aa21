"""Sinkhorn-Knopp in C, with its iterates in the first cache level: a quarter of the torch code's time or less."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library
from engram.kernels.sinkhorn.reference import positive_matrix

SOURCE = Path(__file__).with_name("native.c")


def sinkhorn_native(logits: Tensor, steps: int) -> Tensor:
    x = positive_matrix(logits)
    out = torch.empty_like(x)
    _call("sinkhorn_forward", (x, out), steps)
    return out


def sinkhorn_backward_native(logits: Tensor, grad: Tensor, steps: int) -> Tensor:
    x = positive_matrix(logits)
    grad_x = torch.empty_like(x)
    _call("sinkhorn_backward", (x, grad, grad_x), steps)
    return grad_x * x


def _call(name: str, tensors: tuple[Tensor, ...], steps: int) -> None:
    size, _, count = tensors[0].shape
    assert all(t.is_contiguous() and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    function = getattr(load_library(SOURCE), name)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    if function(*pointers, ctypes.c_long(count), ctypes.c_int(size), ctypes.c_int(2 * steps)):
        raise MemoryError(f"{name}: no memory for the iterates of {size} x {size} matrices over {steps} steps")
