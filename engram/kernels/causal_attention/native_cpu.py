"""Causal attention in C++, for bfloat16 on CPU: scores never leave the cache, keys in the future cost nothing."""

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


class NativeAttention(torch.autograd.Function):
    """Forward keeps the result and each query's log-sum-exp; the backward pass recomputes the probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out, log_sums = torch.ops.engram.causal_attention(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, log_sums)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        found = torch.ops.engram.causal_attention_backward(*grads, q, k, v, mask, out, log_sums, ctx.scale)
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in found)
        return dq, dk, dv, None, None


@torch.library.custom_op("engram::causal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Result [B, T, H, V], and float32 [B, H, T]: the logarithm of each query's sum of exponentials."""
    q, k, v = (_with_whole_rows(tensor) for tensor in (q, k, v))
    out, log_sums = _by_position(v), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("attention_forward", q, k, v, mask, scale, out, log_sums)
    return out, log_sums


@torch.library.custom_op("engram::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, [B, T, H, N] and [B, T, H, V]."""
    grad, q, k, v = (_with_whole_rows(tensor) for tensor in (grad, q, k, v))
    dq, dk, dv = _by_position(q), _by_position(k), _by_position(v)
    views = [_heads(each) for each in (grad, dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))]
    _call("attention_backward", q, k, v, mask, scale, out, log_sums.contiguous(), *views)
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _by_position(v), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(q), _by_position(k), _by_position(v)


def _by_position(like: Tensor) -> Tensor:
    """Uninitialised [B, T, H, width] for [B, H, T, width]: the layout that projections read and write."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width)


def _with_whole_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _heads(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 4)(tensor.data_ptr(), *tensor.stride()[:3])


def _call(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    log_sums: Tensor,
    *rest: Any,
) -> None:
    sizes = (ctypes.c_int64 * 5)(*q.shape, v.shape[-1])
    if mask is not None:
        mask = _with_whole_rows(mask)
    seen = (ctypes.c_int64 * 3)(*((mask.data_ptr(), mask.stride(0), mask.stride(2)) if mask is not None else (0, 0, 0)))
    given = (_heads(q), _heads(k), _heads(v), seen, ctypes.c_float(scale), _heads(out.transpose(1, 2)))
    if getattr(load_library(SOURCE), name)(sizes, *given, ctypes.c_void_p(log_sums.data_ptr()), *rest):
        raise MemoryError(f"{name}: no memory for the scratch of {q.shape[2]} positions")
