"""mHC in C++ for CPU: every function goes over the streams once, with Sinkhorn in registers."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library

PRE, POST = (Path(__file__).with_name(f"native_{half}.cpp") for half in ("pre", "post"))


def pre_forward_native(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, G, D] -> u [N, D], h_post [N, G], h_res [N, G, G], then for the backward pass the normalised products
    [N, O] and the inverse root mean squares [N]."""
    tokens, streams, width = x.shape
    u = x.new_empty(tokens, width)
    h_post, h_res, normalised, inverse_rms = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((tokens, streams), (tokens, streams, streams), (tokens, len(bias)), (tokens,))
    )
    outputs = (u, h_post, h_res, normalised, inverse_rms)
    _call("mhc_pre_forward", x, (x, weight, scale, bias, *outputs), ctypes.c_int(steps), ctypes.c_float(eps))
    return outputs


def pre_backward_native(
    saved: tuple[Tensor, ...], du: Tensor, carried: Tensor | None, dpost: Tensor, dres: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale and bias; `saved`: x, weight, scale, bias, normalised, inverse_rms."""
    x, weight, scale, bias, *_ = saved
    dx, dweight, dscale, dbias = (torch.empty_like(tensor) for tensor in (x, weight, scale, bias))
    gradients = (dx, dweight, dscale, dbias)
    _call("mhc_pre_backward", x, (*saved, du, carried, dpost, dres, *gradients), ctypes.c_int(steps))
    return gradients


def post_forward_native(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _call("mhc_post_forward", x, (x, y, h_post, h_res, out))
    return out


def post_backward_native(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dpost, dres = (torch.empty_like(tensor) for tensor in (x, y, h_post, h_res))
    _call("mhc_post_backward", x, (x, y, h_post, h_res, dout, dx, dy, dpost, dres))
    return dx, dy, dpost, dres


def _call(name: str, x: Tensor, tensors: tuple[Tensor | None, ...], *more: object) -> None:
    assert all(t is None or (t.is_contiguous() and t.dtype in (x.dtype, torch.float32)) for t in tensors)
    tokens, streams, width = x.shape
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    shape = (ctypes.c_long(tokens), ctypes.c_long(width), ctypes.c_int(streams))
    getattr(load_library(POST if "post" in name else PRE), name)(
        *pointers, *shape, ctypes.c_int(x.dtype == torch.float32), *more
    )
