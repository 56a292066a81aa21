"""Cross-entropy of a linear head, by chunks of tokens: all logits of a large vocabulary never exist at once."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram.kernels.linear_cross_entropy.reference import linear_cross_entropy_ref

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ref", "token_cross_entropy"]

IGNORE = -100
# Logits in one chunk: 2^22 float32 values are 16 MiB, which a CPU's last cache level may hold; a GPU wants more work.
CHUNK_LOGITS = 2**22
CHUNK_LOGITS_CUDA = 2**27
# Every chunk reads the whole head and adds to its whole gradient: fewer tokens would not pay for that.
MIN_TOKENS = 128


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
    """L = sum_t logsumexp(W x_t) - (W x_t)[target_t] over targets that are not -100; a scalar.

    x [T, D] in the compute dtype, weight [V, D] float32 (the product runs in x's dtype, the softmax in float32),
    targets int64 [T]. A sum scales its gradient by one number, so the gradient is taken while a chunk's logits are at
    hand and no product is computed twice. `compiled` fuses what lies between the products.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return token_cross_entropy(x, weight, targets).sum()
    return _LinearCrossEntropy.apply(x, weight, targets, compiled)


@torch.no_grad()
def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, float32 [T], 0 where the target is -100; without a gradient."""
    head = weight.to(x.dtype)
    losses = [_losses((x[part] @ head.t()).float(), targets[part])[0] for part in _chunks(x, weight)]
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
        loss_and_delta = _compiled_loss_and_delta() if compiled else _loss_and_delta
        head = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for part in _chunks(x, weight):
            loss, delta = loss_and_delta(x[part] @ head.t(), targets[part])
            total += loss
            grad_x[part] = delta @ head
            grad_weight += delta.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x.float() * grads[0]).to(grad_x.dtype), grad_weight * grads[0], None, None


def _loss_and_delta(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk, and softmax - onehot in the logits' dtype (0 where the target is -100)."""
    logits32 = logits.float()
    losses, log_norms = _losses(logits32, targets)
    columns = torch.arange(logits.shape[1], device=logits.device)
    delta = torch.exp(logits32 - log_norms.unsqueeze(1)) - (columns == targets.unsqueeze(1)).float()
    return losses.sum(), torch.where((targets == IGNORE).unsqueeze(1), 0.0, delta).to(logits.dtype)


@functools.cache
def _compiled_loss_and_delta() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_delta)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-normalisers [T] of one chunk's logits [T, V]."""
    log_norms = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(targets == IGNORE, 0.0, log_norms - picked), log_norms


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    size = max((CHUNK_LOGITS_CUDA if x.is_cuda else CHUNK_LOGITS) // len(weight), MIN_TOKENS)
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]
