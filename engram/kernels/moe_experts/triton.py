"""Routed experts in Triton: the operation with its gradient, and the kernels as the shipped configs launch them.

Legend: T tokens, K experts per token, N = T K rows, D hidden, E experts, F expert width, M tiles.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from engram.kernels.compile_ahead import Build, record
from engram.kernels.moe_experts.triton_backward import backward
from engram.kernels.moe_experts.triton_forward import forward
from engram.kernels.moe_experts.triton_routing import Routing, allocate


def moe_experts_triton(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """y_t = sum_k w_tk down_e (silu(gate_e x_t) * up_e x_t); an expert id outside [0, E) adds nothing.

    x [T, D], gate_up [E, 2, F, D] and down [E, D, F] of one dtype, D and F multiples of 16; expert_ids int64 [T, K];
    weights float32 [T, K]. Returns [T, D] in x's dtype. Deterministic, and never waits for the device.
    """
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weights, gate_up, down))
    return _forward(x, expert_ids, weights, gate_up, down, save)[0]


@torch.library.custom_op("engram::moe_experts_triton", mutates_args=())
def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D]; the pre-activations [N, 2, F] if `save`, else [0, 2, F]; the four tensors of the routing."""
    if ids.numel() == 0:
        return _forward_like(x, ids, weights, gate_up, down, save)
    x, ids, weights, gate_up, down = (tensor.contiguous() for tensor in (x, ids, weights, gate_up, down))
    with torch.cuda.device_of(x):
        y, kept, routing = forward(x, ids, weights, gate_up, down, save)
    return y, kept, *routing


@torch.library.custom_op("engram::moe_experts_triton_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kept: Tensor, routing: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weights.numel() == 0:
        return x.new_zeros(x.shape), weights.new_zeros(weights.shape), torch.zeros_like(gate_up), torch.zeros_like(down)
    dy, x, weights, gate_up, down = (tensor.contiguous() for tensor in (dy, x, weights, gate_up, down))
    with torch.cuda.device_of(x):
        return backward(dy, x, weights, gate_up, down, kept, Routing(*routing))


@_forward.register_fake
def _forward_like(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = x.new_empty(ids.numel() if save else 0, *gate_up.shape[1:3])
    return x.new_empty(x.shape), kept, *allocate(ids, len(down))


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kept: Tensor, routing: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, gate_up, down = (tensor.new_empty(tensor.shape) for tensor in (x, weights, gate_up, down))
    return x, weights, gate_up, down


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, gate_up, down, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])


def _gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, weights, gate_up, down, kept, *routing = ctx.saved_tensors
    dx, dweights, dgate_up, ddown = _backward(dy, x, weights, gate_up, down, kept, routing)
    return dx, None, dweights, dgate_up, ddown, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def builds() -> list[Build]:
    """Forward and backward of the shipped shapes: quickstart, tiny, and the experts of Engram-27B and MoE-27B."""
    shapes = [
        # tokens, hidden, experts, width, top_k
        ("quickstart", (4096, 128, 16, 64, 2), torch.float32),
        ("tiny", (4096, 192, 32, 96, 2), torch.float32),
        ("tiny", (4096, 192, 32, 96, 2), torch.bfloat16),
        ("engram_27b", (32768, 2560, 55, 1536, 6), torch.bfloat16),
        ("engram_27b decoding", (8, 2560, 55, 1536, 6), torch.bfloat16),
        ("moe_27b", (32768, 2560, 72, 1536, 6), torch.bfloat16),
    ]
    return [
        build
        for name, shape, dtype in shapes
        for build in record(f"{name} {str(dtype).removeprefix('torch.')}", functools.partial(_launch, *shape, dtype))
    ]


def _launch(tokens: int, hidden: int, experts: int, width: int, top_k: int, dtype: torch.dtype) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, gate_up, down = meta(tokens, hidden), meta(experts, 2, width, hidden), meta(experts, hidden, width)
    weights = meta(tokens, top_k, dtype=torch.float32)
    y, kept, routing = forward(x, meta(tokens, top_k, dtype=torch.int64), weights, gate_up, down, save=True)
    backward(y, x, weights, gate_up, down, kept, routing)
