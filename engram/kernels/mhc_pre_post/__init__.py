"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): what surrounds a sublayer on G residual streams.

    u = sum_i h_pre[i] x[i],   y = sublayer(u),   x'[o] = sum_i h_res[o, i] x[i] + h_post[o] y

The coefficients come from the streams themselves: (pre, post, res) = scale * rmsnorm(x) W^T + bias, and then
h_pre = sigmoid(pre), h_post = 2 sigmoid(post), and h_res is exp(res) made doubly stochastic by Sinkhorn-Knopp, which
ends on the axis that the mix sums over. Nothing of Sinkhorn is kept for the backward pass.
"""

import torch
from torch import Tensor

from engram.kernels.choose import (
    Implementation,
    check_devices,
    check_integers,
    choose,
    triton_obstacle,
    width_obstacle,
)
from engram.kernels.mhc_pre_post.autograd import Post, Pre
from engram.kernels.mhc_pre_post.native_cpu import POST, PRE
from engram.kernels.mhc_pre_post.reference import mhc_coefficients_ref, mhc_post_ref, mhc_pre_ref
from engram.kernels.native import native_obstacle

__all__ = ["mhc_coefficients_ref", "mhc_post", "mhc_post_ref", "mhc_pre", "mhc_pre_carry", "mhc_pre_ref"]

MAX_STREAMS = 8


def mhc_pre(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    steps: int,
    eps: float,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(u, h_post, h_res): a sublayer's input, and what `mhc_post` needs to add its output.

    x [B, T, G, D] in float32 or bfloat16 (triton: float16 too); weight [2G + G^2, G D], scale [3] and bias [2G + G^2]
    for pre, post and res in this order; `steps` of Sinkhorn. Returns u [B, T, D] in the dtype of x, h_post [B, T, G]
    and h_res [B, T, G out, G in] in float32; each row of h_res sums to 1. Kernels take up to 8 streams and widths that
    are multiples of 16. Raises TypeError, ValueError, ImplementationUnavailable.
    """
    return mhc_pre_carry(x, weight, scale, bias, steps=steps, eps=eps, impl=impl)[:3]


def mhc_pre_carry(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    steps: int,
    eps: float,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mhc_pre`, and x itself last: the gradient of this x is added while the one of `mhc_pre` is written.

    An `mhc_post` that takes it spares the backward pass one addition over all streams.
    """
    _check_streams(x)
    _check_parameters(x, weight, scale, bias)
    check_devices("mhc_pre", x=x, weight=weight, scale=scale, bias=bias)
    check_integers("mhc_pre", steps=steps)
    if steps < 1:
        raise ValueError(f"steps is {steps}: Sinkhorn needs at least one to make the rows of h_res sum to 1")
    chosen = _choice("mhc_pre", impl, x.device.type, x.dtype, x.shape[2], x.shape[3])
    if chosen == "reference":
        return (*mhc_pre_ref(x, weight, scale, bias, steps=steps, eps=eps), x)
    return Pre.apply(x, weight.float(), scale.float(), bias.float(), steps, eps, chosen)


def mhc_post(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """x' [B, T, G, D] of streams x [B, T, G, D] and a sublayer's output y [B, T, D].

    h_post [B, T, G] and h_res [B, T, G out, G in] in float32, as `mhc_pre` gives them. Limits and errors as there.
    """
    _check_streams(x)
    batch, tokens, streams, width = x.shape
    _check_shape("y", y, (batch, tokens, width))
    _check_shape("h_post", h_post, (batch, tokens, streams))
    _check_shape("h_res", h_res, (batch, tokens, streams, streams))
    check_devices("mhc_post", x=x, y=y, h_post=h_post, h_res=h_res)
    if y.dtype != x.dtype:
        raise TypeError(f"y is {y.dtype}, but x is {x.dtype}: make them equal")
    chosen = _choice("mhc_post", impl, x.device.type, x.dtype, streams, width)
    if chosen == "reference":
        return mhc_post_ref(x, y, h_post, h_res)
    return Post.apply(x, y, h_post.float(), h_res.float(), chosen)


@torch.compiler.assume_constant_result
def _choice(op: str, impl: str, device: str, dtype: torch.dtype, streams: int, width: int) -> str:
    return choose(
        op,
        impl,
        device,
        triton=lambda: _shape_obstacle(streams, width) or _triton_obstacle(device, dtype),
        native=lambda: _shape_obstacle(streams, width) or _native_obstacle(device, dtype),
    )


def _shape_obstacle(streams: int, width: int) -> str | None:
    if streams > MAX_STREAMS:
        return f"there are {streams} streams, and it is for 1 to {MAX_STREAMS}"
    return width_obstacle("streams", width)


def _triton_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is for float32, bfloat16 and float16, not {dtype}"
    return triton_obstacle(device)


def _native_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it is for float32 and bfloat16 on CPU, not {dtype} on {device}"
    return native_obstacle(PRE) or native_obstacle(POST)


def _check_streams(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, but streams are floating-point numbers")
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [batch, tokens, streams, width]")


def _check_parameters(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    streams, width = x.shape[2:]
    outputs = streams * (streams + 2)
    _check_shape("weight", weight, (outputs, streams * width))
    _check_shape("scale", scale, (3,))
    _check_shape("bias", bias, (outputs,))


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the streams need {list(expected)}")
