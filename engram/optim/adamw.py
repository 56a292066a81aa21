"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one fused pass over weights, gradients and moments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.optim.groups import Assignment
from engram.optim.role import Role


class AdamW(Role):
    """m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w = (1 - lr wd) w - lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps).

    t counts a parameter's own updates. Sparse gradients are made dense: as an optimizer of tables this is the paper's
    Adam, whose stale moments also move rows that were not read.
    """

    def __init__(self, assignments: Sequence[Assignment], betas: tuple[float, float], eps: float) -> None:
        super().__init__(assignments)
        self.betas = betas
        self.eps = eps
        self._buckets: dict[tuple[float, float, torch.device], list[Assignment]] = {}
        for each in self.assignments:
            self.tensors[f"{each.name}/first_moment"] = torch.zeros_like(each.parameter)
            self.tensors[f"{each.name}/second_moment"] = torch.zeros_like(each.parameter)
            self.counts[f"{each.name}/step"] = 0
            # One fused call has one learning rate and one decay.
            key = (each.lr_multiplier, each.weight_decay, each.parameter.device)
            self._buckets.setdefault(key, []).append(each)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (lr_multiplier, weight_decay, device), bucket in self._buckets.items():
            live = [each for each in bucket if each.parameter.grad is not None]
            if not live:
                continue
            for each in live:
                self.counts[f"{each.name}/step"] += 1
            counts = [self.counts[f"{each.name}/step"] for each in live]
            # Filled in on the device, where a copy would wait for it; nearly always there is one count for all.
            filled = {count: torch.full((), float(count), device=device) for count in set(counts)}
            torch._fused_adamw_(
                [each.parameter for each in live],
                [_plain(each.parameter.grad) for each in live],
                [self.tensors[f"{each.name}/first_moment"] for each in live],
                [self.tensors[f"{each.name}/second_moment"] for each in live],
                [],
                [filled[count] for count in counts],
                lr=lr * lr_multiplier,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )


def _plain(gradient: Tensor | None) -> Tensor:
    """The kernel walks memory in order and would silently misread a transposed or expanded gradient."""
    assert gradient is not None
    return (gradient.to_dense() if gradient.is_sparse else gradient).contiguous()
