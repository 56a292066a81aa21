"""Sinkhorn-Knopp in plain torch: the specification, and its gradient by recomputation.

Legend: G streams, N independent matrices.
"""

import torch
from torch import Tensor


def positive_matrix(logits_GGN: Tensor) -> Tensor:
    """exp(logits), each column scaled to a largest entry of 1.

    The scale cancels in the first normalisation; it keeps exp in range. No entry falls so low that a sum could be 0.
    """
    return torch.exp(logits_GGN - logits_GGN.amax(0, keepdim=True)).clamp_min(1e-20)


def sinkhorn_ref(logits_GGN: Tensor, steps: int) -> Tensor:
    """Alternate column (axis 0) and row (axis 1) normalisation of exp(logits), ending on rows."""
    x = positive_matrix(logits_GGN)
    for _ in range(steps):
        x = x / x.sum(0, keepdim=True)
        x = x / x.sum(1, keepdim=True)
    return x


def sinkhorn_backward(logits_GGN: Tensor, grad_GGN: Tensor, steps: int) -> Tensor:
    """Gradient with respect to the logits. Iterates are recomputed, and each half-step y = x / sum(x) is reversed:
    dx = (dy - sum(dy * y)) / sum(x)."""
    x = positive_matrix(logits_GGN)
    exponential = x
    outputs, inverse_sums = [], []
    for half_step in range(2 * steps):
        inverse_sum = x.sum(half_step % 2, keepdim=True).reciprocal_()
        x = x * inverse_sum
        outputs.append(x)
        inverse_sums.append(inverse_sum)
    grad = grad_GGN
    for half_step in reversed(range(2 * steps)):
        projection = (grad * outputs[half_step]).sum(half_step % 2, keepdim=True)
        grad = (grad - projection) * inverse_sums[half_step]
    return grad * exponential
