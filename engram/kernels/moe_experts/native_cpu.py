"""Routed experts in C++, for bfloat16 on CPU: from gathered to weighted rows within the cache."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.kernels.native import load_library, products_obstacle

SOURCE = Path(__file__).with_name("native.cpp")


def native_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu" or dtype != torch.bfloat16:
        return f"it is for bfloat16 on CPU, not {dtype} on {device}"
    return products_obstacle(SOURCE)


class NativeExperts(torch.autograd.Function):
    """Weights' gradients come in the weights' dtype, summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out, saved, order, starts = torch.ops.engram.moe_experts(x, expert_ids, weights, gate_up, down)
        ctx.save_for_backward(x, weights, gate_up, down, saved, order, starts)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights, dgate_up, ddown = torch.ops.engram.moe_experts_backward(*grads, *ctx.saved_tensors)
        return dx, None, dweights, dgate_up, ddown


@torch.library.custom_op("engram::moe_experts", mutates_args=())
def _forward(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D]; for the backward pass gate and up [T K, 2, F] by place, each place's choice and each expert's start."""
    x, expert_ids, weights = x.contiguous(), expert_ids.contiguous(), weights.contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    experts, _, width, hidden = gate_up.shape
    choices = expert_ids.numel()
    out = torch.empty_like(x)
    saved = x.new_empty(choices, 2, width)
    order = torch.empty(choices, dtype=torch.int32)
    starts = torch.empty(experts + 1, dtype=torch.int32)
    rows = x.new_empty(choices, hidden)
    _call("moe_forward", x, expert_ids, weights, gate_up, down, out, saved, order, starts, rows)
    return out, saved, order, starts


@torch.library.custom_op("engram::moe_experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    saved: Tensor,
    order: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, weights = grad.contiguous(), x.contiguous(), weights.contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    dx, dweights, dgate_up, ddown = (torch.empty_like(tensor) for tensor in (x, weights, gate_up, down))
    rows = x.new_empty(len(order), x.shape[1])
    given = grad, x, weights, gate_up, down, saved, order, starts
    _call("moe_backward", *given, dx, dweights, dgate_up, ddown, rows)
    return dx, dweights, dgate_up, ddown


@_forward.register_fake
def _(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choices = expert_ids.numel()
    saved = x.new_empty(choices, *gate_up.shape[1:3])
    order, starts = (x.new_empty(size, dtype=torch.int32) for size in (choices, len(gate_up) + 1))
    return x.new_empty(x.shape), saved, order, starts


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    saved: Tensor,
    order: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweights, dgate_up, ddown = (tensor.new_empty(tensor.shape) for tensor in (x, weights, gate_up, down))
    return dx, dweights, dgate_up, ddown


def _call(name: str, *tensors: Tensor) -> None:
    """Operands in the order of the C++ function, where the third and fourth are always weights and gate_up."""
    weights, gate_up = tensors[2:4]
    (num_tokens, top_k), (experts, _, width, hidden) = weights.shape, gate_up.shape
    sizes = (ctypes.c_int64 * 5)(num_tokens, hidden, experts, width, top_k)
    assert all(tensor.is_contiguous() for tensor in tensors)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    outcome = getattr(load_library(SOURCE), name)(*pointers, sizes, ctypes.c_int(gate_up.dtype == torch.float32))
    if outcome == 1:
        raise MemoryError(f"{name}: no memory for the scratch of experts of {width} x {hidden}")
    if outcome == 2:
        raise IndexError(_bad_id(tensors[1], experts))


def _bad_id(expert_ids: Tensor, experts: int) -> str:
    token, choice = ((expert_ids < 0) | (expert_ids >= experts)).nonzero()[0].tolist()
    return f"expert id {int(expert_ids[token, choice])} at [{token}, {choice}] is not one of {experts} experts"


@torch.library.custom_op("engram::checked_expert_ids", mutates_args=())
def checked_ids(expert_ids: Tensor, experts: int) -> Tensor:
    """A copy of the ids [T, K], for code that does not check them. Raises IndexError, in compiled graphs too."""
    if ((expert_ids < 0) | (expert_ids >= experts)).any():
        raise IndexError(_bad_id(expert_ids, experts))
    return expert_ids.clone()


@checked_ids.register_fake
def _(expert_ids: Tensor, experts: int) -> Tensor:
    return torch.empty_like(expert_ids)
