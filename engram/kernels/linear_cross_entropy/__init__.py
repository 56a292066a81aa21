"""Cross-entropy of a linear head, by chunks of tokens: all logits of a large vocabulary never exist at once."""

from typing import Any

import torch
from torch import Tensor

from engram.kernels.linear_cross_entropy.reference import linear_cross_entropy_ref

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ref"]

IGNORE = -100
# Logits in one chunk: 2^24 float32 values are 64 MiB.
CHUNK_LOGITS = 2**24


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """l_t = logsumexp(W x_t) - (W x_t)[target_t], and 0 where the target is -100.

    x [T, D] in the compute dtype, weight [V, D] float32 (the product runs in x's dtype, the softmax in float32),
    targets int64 [T]. Returns float32 [T]. The gradient is computed by recomputing each chunk.
    """
    return _LinearCrossEntropy.apply(x, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = weight.to(x.dtype)
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        log_norms = torch.empty_like(losses)
        for part in _chunks(len(x), len(weight)):
            logits = (x[part] @ head.t()).float()
            log_norms[part] = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, targets[part].clamp(min=0).unsqueeze(1)).squeeze(1)
            losses[part] = (log_norms[part] - picked).masked_fill_(targets[part] == IGNORE, 0.0)
        ctx.save_for_backward(x, weight, targets, log_norms)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, log_norms = ctx.saved_tensors
        head = weight.to(x.dtype)
        grad_losses = grads[0].masked_fill(targets == IGNORE, 0.0)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for part in _chunks(len(x), len(weight)):
            # softmax - onehot, scaled by the loss's gradient.
            delta = torch.exp((x[part] @ head.t()).float() - log_norms[part].unsqueeze(1))
            column = targets[part].clamp(min=0).unsqueeze(1)
            delta.scatter_add_(1, column, delta.new_full((1, 1), -1.0).expand(len(delta), 1))
            delta = (delta * grad_losses[part].unsqueeze(1)).to(x.dtype)
            grad_x[part] = delta @ head
            grad_weight += delta.t() @ x[part]
        return grad_x, grad_weight.to(weight.dtype), None


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(CHUNK_LOGITS // vocab_size, 1)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
