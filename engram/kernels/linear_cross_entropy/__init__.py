"""Cross-entropy of a linear head, by chunks of tokens: all logits of a large vocabulary never exist at once."""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.linear_cross_entropy.reference import linear_cross_entropy_ref

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ref", "token_cross_entropy"]

IGNORE = -100
# Logits in one chunk: 2^22 float32 values are 16 MiB, which the last cache level may hold.
CHUNK_LOGITS = 2**22


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """L = sum_t logsumexp(W x_t) - (W x_t)[target_t] over targets that are not -100; a scalar.

    x [T, D] in the compute dtype, weight [V, D] float32 (the product runs in x's dtype, the softmax in float32),
    targets int64 [T]. A sum scales its gradient by one number, so the gradient is taken while a chunk's logits are at
    hand and no product is computed twice.
    """
    return _LinearCrossEntropy.apply(x, weight, targets)


@torch.no_grad()
def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, float32 [T], 0 where the target is -100; without a gradient."""
    head = weight.to(x.dtype)
    losses = [_losses((x[part] @ head.t()).float(), targets[part])[0] for part in _chunks(len(x), len(weight))]
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return token_cross_entropy(x, weight, targets).sum()
        head = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for part in _chunks(len(x), len(weight)):
            logits = (x[part] @ head.t()).float()
            losses, log_norms = _losses(logits, targets[part])
            total += losses.sum()
            # softmax - onehot, in place of the logits.
            delta = logits.sub_(log_norms.unsqueeze(1)).exp_()
            column = targets[part].clamp(min=0).unsqueeze(1)
            delta.scatter_add_(1, column, delta.new_full((1, 1), -1.0).expand(len(delta), 1))
            delta = delta.to(x.dtype).masked_fill_((targets[part] == IGNORE).unsqueeze(1), 0.0)
            grad_x[part] = delta @ head
            grad_weight += delta.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0].to(grad_x.dtype), grad_weight * grads[0], None


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-normalisers [T] of one chunk's logits [T, V]."""
    log_norms = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (log_norms - picked).masked_fill_(targets == IGNORE, 0.0), log_norms


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(CHUNK_LOGITS // vocab_size, 1)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
