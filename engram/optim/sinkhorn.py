"""Momentum with Sinkhorn balancing, the table optimizer of DeepSeek-V4.1 (arXiv 2609.19969, section 2.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.config import TableOptimConfig
from engram.kernels.sinkhorn_momentum import sinkhorn_momentum_
from engram.optim.groups import Assignment
from engram.optim.role import TableRole


class SinkhornMomentum(TableRole):
    """M = mu M + (1-mu) G;  H = mu M + (1-mu) G;  W = W - lr update_rms sqrt(D) balanced(H), D the width of a row.

    Balancing divides rows and columns by their L2 norms in turn and ends on rows, so that a row moves by exactly
    lr update_rms in root mean square, or not at all: rows of H whose norm is at most inactive_row_threshold times the
    mean norm of the table's rows are inactive. Momentum is as large as the table, gradients are not.
    """

    def __init__(self, assignments: Sequence[Assignment], settings: TableOptimConfig) -> None:
        super().__init__(assignments)
        self.settings = settings
        for each in self.assignments:
            self.tensors[f"{each.name}/momentum"] = torch.zeros_like(each.parameter, dtype=torch.float32)

    def update(self, assignment: Assignment, gradient: Tensor, lr: float, seed: int) -> None:
        settings = self.settings
        sinkhorn_momentum_(
            assignment.parameter,
            self.tensors[f"{assignment.name}/momentum"],
            gradient._values().contiguous(),
            gradient._indices()[0],
            lr=lr,
            beta=settings.momentum,
            steps=settings.sinkhorn_steps,
            threshold=settings.inactive_row_threshold,
            update_rms=settings.update_rms,
            weight_decay=assignment.weight_decay,
            seed=seed,
            part=assignment.part,
        )
