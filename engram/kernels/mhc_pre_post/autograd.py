"""mHC's two halves as operations that compiled graphs keep whole, and their gradients.

Legend: N tokens, G streams, D width, O = G (G + 2) coefficients.
"""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.mhc_pre_post.native_cpu import (
    post_backward_native,
    post_forward_native,
    pre_backward_native,
    pre_forward_native,
)


@torch.library.custom_op("engram::mhc_pre", mutates_args=())
def pre_forward(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: int, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, G, D] -> u [N, D], h_post [N, G], h_res [N, G, G]; products of the normalised x [N, O], 1 / rms [N]."""
    if impl == "triton":
        from engram.kernels.mhc_pre_post.triton import pre_forward_triton

        with torch.cuda.device_of(x):
            return pre_forward_triton(x, weight, scale, bias, steps, eps)
    return pre_forward_native(x, weight, scale, bias, steps, eps)


@pre_forward.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: int, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, streams, width = x.shape
    return (
        x.new_empty(tokens, width),
        bias.new_empty(tokens, streams),
        bias.new_empty(tokens, streams, streams),
        bias.new_empty(tokens, streams * (streams + 2)),
        bias.new_empty(tokens),
    )


@torch.library.custom_op("engram::mhc_pre_backward", mutates_args=())
def pre_backward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalised: Tensor,
    inverse_rms: Tensor,
    du: Tensor,
    carried: Tensor | None,
    dpost: Tensor,
    dres: Tensor,
    steps: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (with `carried` added), weight, scale and bias."""
    saved = (x, weight, scale, bias, normalised, inverse_rms)
    if impl == "triton":
        from engram.kernels.mhc_pre_post.triton import pre_backward_triton

        with torch.cuda.device_of(x):
            return pre_backward_triton(saved, du, carried, dpost, dres, steps)
    return pre_backward_native(saved, du, carried, dpost, dres, steps)


@pre_backward.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(scale), torch.empty_like(bias)


@torch.library.custom_op("engram::mhc_post", mutates_args=())
def post_forward(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, impl: str) -> Tensor:
    """x [N, G, D], y [N, D], h_post [N, G], h_res [N, G, G] -> [N, G, D]."""
    if impl == "triton":
        from engram.kernels.mhc_pre_post.triton import post_forward_triton

        with torch.cuda.device_of(x):
            return post_forward_triton(x, y, h_post, h_res)
    return post_forward_native(x, y, h_post, h_res)


@post_forward.register_fake
def _(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("engram::mhc_post_backward", mutates_args=())
def post_backward(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, dout: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, h_post and h_res."""
    if impl == "triton":
        from engram.kernels.mhc_pre_post.triton import post_backward_triton

        with torch.cuda.device_of(x):
            return post_backward_triton(x, y, h_post, h_res, dout)
    return post_backward_native(x, y, h_post, h_res, dout)


@post_backward.register_fake
def _(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, dout: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(h_post), torch.empty_like(h_res)


class Pre(torch.autograd.Function):
    """x [B, T, G, D] -> u, h_post, h_res, and x once more.

    x passes through, so that its gradient from elsewhere arrives here instead of meeting ours in an addition after it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: int, eps: float, impl: str
    ) -> tuple[Tensor, ...]:
        rows, *parameters = (tensor.contiguous() for tensor in (x.flatten(0, 1), weight, scale, bias))
        *outputs, normalised, inverse_rms = pre_forward(rows, *parameters, steps, eps, impl)
        ctx.save_for_backward(rows, *parameters, normalised, inverse_rms)
        ctx.steps, ctx.impl, ctx.batch = steps, impl, x.shape[:2]
        ctx.set_materialize_grads(False)
        return (*(output.unflatten(0, x.shape[:2]) for output in outputs), x.view_as(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale, bias, *kept = ctx.saved_tensors
        tokens, streams, width = x.shape
        du, dpost, dres, carried = (
            gradient if gradient is None else gradient.flatten(0, 1).contiguous() for gradient in gradients
        )
        du = x.new_zeros(tokens, width) if du is None else du
        dpost = bias.new_zeros(tokens, streams) if dpost is None else dpost
        dres = bias.new_zeros(tokens, streams, streams) if dres is None else dres
        dx, *rest = pre_backward(x, weight, scale, bias, *kept, du, carried, dpost, dres, ctx.steps, ctx.impl)
        return dx.unflatten(0, ctx.batch), *rest, None, None, None


class Post(torch.autograd.Function):
    """x [B, T, G, D], y [B, T, D], h_post [B, T, G], h_res [B, T, G, G] -> x' [B, T, G, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, impl: str) -> Tensor:
        inputs = tuple(tensor.flatten(0, 1).contiguous() for tensor in (x, y, h_post, h_res))
        ctx.save_for_backward(*inputs)
        ctx.impl, ctx.batch = impl, x.shape[:2]
        return post_forward(*inputs, impl).unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = post_backward(*ctx.saved_tensors, dout.flatten(0, 1).contiguous(), ctx.impl)
        return *(gradient.unflatten(0, ctx.batch) for gradient in gradients), None
