"""Clipping by the global norm, with sparse gradients counted once."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engram.optim.sparse import coalesce


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm) and return the global norm before scaling (0-d float32).

    The norm of a sparse gradient is that of the dense one it stands for: rows that were read several times are summed
    first, and the coalesced gradient stays on `.grad`, for the update to use as it is. `max_norm=None` only measures. A
    non-finite norm is returned and leaves the gradients unscaled, so that the caller decides.
    """
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = coalesce(parameter.grad)
            gradients.append(parameter.grad._values())
        else:
            gradients.append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    device = gradients[0].device
    norm = torch.linalg.vector_norm(torch.stack([each.to(device) for each in torch._foreach_norm(gradients)]))
    if max_norm is not None and max_norm < (value := norm.item()) < math.inf:
        torch._foreach_mul_(gradients, max_norm / value)
    return norm
