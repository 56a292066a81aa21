"""Sinkhorn-Knopp: a positive matrix made doubly stochastic, as one operation that compiled graphs do not unroll."""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, choose
from engram.kernels.native import native_obstacle
from engram.kernels.sinkhorn.native_cpu import SOURCE, sinkhorn_backward_native, sinkhorn_native
from engram.kernels.sinkhorn.reference import sinkhorn_backward, sinkhorn_ref

__all__ = ["sinkhorn", "sinkhorn_ref"]


def sinkhorn(logits: Tensor, steps: int, impl: Implementation = "auto") -> Tensor:
    """exp(logits) after `steps` column-then-row normalisations; each row of the result sums to 1.

    logits: float32 [G, G, N], axis 0 the output stream, axis 1 the input stream, N independent matrices (last, so that
    every normalisation is one vectorised pass). Returns float32 [G, G, N] with sum over axis 1 equal to 1. `native` is
    C, for CPU; `auto` takes it where a C compiler is. Raises ImplementationUnavailable where `native` is asked for and
    not there.
    """
    return torch.ops.engram.sinkhorn(logits, steps, impl)


@torch.library.custom_op("engram::sinkhorn", mutates_args=())
def _forward(logits: Tensor, steps: int, impl: str) -> Tensor:
    run = sinkhorn_native if _native(logits, impl) else sinkhorn_ref
    return run(logits.contiguous(), steps)


@torch.library.custom_op("engram::sinkhorn_backward", mutates_args=())
def _backward(logits: Tensor, grad: Tensor, steps: int, impl: str) -> Tensor:
    run = sinkhorn_backward_native if _native(logits, impl) else sinkhorn_backward
    return run(logits.contiguous(), grad.contiguous(), steps)


def _native(logits: Tensor, impl: str) -> bool:
    return choose("sinkhorn", impl, logits.device.type, native=lambda: _native_obstacle(logits)) == "native"


def _native_obstacle(logits: Tensor) -> str | None:
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return f"it is for float32 on CPU, not {logits.dtype} on {logits.device.type}"
    return native_obstacle(SOURCE)


@_forward.register_fake
def _(logits: Tensor, steps: int, impl: str) -> Tensor:
    return logits.new_empty(logits.shape)


@_backward.register_fake
def _(logits: Tensor, grad: Tensor, steps: int, impl: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    logits, ctx.steps, ctx.impl = inputs
    ctx.save_for_backward(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return _backward(logits, grad, ctx.steps, ctx.impl), None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
