"""Row-wise Adagrad: one float32 of state for each row of a table."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.kernels.table_update import RowPlan, rowwise_adagrad_
from engram.optim.groups import Assignment
from engram.optim.role import TableRole, row_ids


class RowwiseAdagrad(TableRole):
    """s_i = s_i + mean_j g_ij^2;  w_i = (1 - lr wd) w_i - lr g_i / (sqrt(s_i) + eps), for rows i with a gradient.

    The exact row-wise Adagrad of recommendation models (arXiv 1906.00091; FBGEMM's EXACT_ROWWISE_ADAGRAD).
    """

    def __init__(self, assignments: Sequence[Assignment], eps: float) -> None:
        super().__init__(assignments)
        self.eps = eps
        for each in self.assignments:
            table = each.parameter
            self.tensors[f"{each.name}/square_sum"] = torch.zeros(len(table), device=table.device)

    def update(self, assignment: Assignment, gradient: Tensor, lr: float, seed: int) -> None:
        rowwise_adagrad_(
            assignment.parameter,
            self.tensors[f"{assignment.name}/square_sum"],
            gradient._values().contiguous(),
            RowPlan.of_sums(gradient._indices()[0]),
            lr=lr,
            eps=self.eps,
            weight_decay=assignment.weight_decay,
            seed=seed,
            row_ids=row_ids(assignment, gradient),
        )
