"""Sinkhorn-Knopp: a positive matrix made doubly stochastic, as one operation that compiled graphs do not unroll."""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.sinkhorn.reference import sinkhorn_backward, sinkhorn_ref

__all__ = ["sinkhorn", "sinkhorn_ref"]


@torch.library.custom_op("engram::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """exp(logits) after `steps` column-then-row normalisations; each row of the result sums to 1.

    logits: float32 [G, G, N], axis 0 the output stream, axis 1 the input stream, N independent matrices (last, so that
    every normalisation is one vectorised pass). Returns float32 [G, G, N] with sum over axis 1 equal to 1.
    """
    return sinkhorn_ref(logits.contiguous(), steps)


@sinkhorn.register_fake
def _(logits: Tensor, steps: int) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("engram::sinkhorn_backward", mutates_args=())
def _backward(logits: Tensor, grad: Tensor, steps: int) -> Tensor:
    return sinkhorn_backward(logits.contiguous(), grad.contiguous(), steps)


@_backward.register_fake
def _(logits: Tensor, grad: Tensor, steps: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    logits, ctx.steps = inputs
    ctx.save_for_backward(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors
    return _backward(logits, grad, ctx.steps), None


sinkhorn.register_autograd(_gradient, setup_context=_setup_context)
