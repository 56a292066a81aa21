"""Adam for tables that moves touched rows only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.kernels.table_update import RowPlan, row_adam_
from engram.optim.groups import Assignment
from engram.optim.role import TableRole, row_ids


class RowAdam(TableRole):
    """Adam on the rows with a gradient; weights, moments and step count of all other rows stay as they are.

    Bias correction counts a row's own updates. Moments that move only when the row does are averages over exactly those
    updates, so that 1 - beta^(own updates) is their total weight; with the global step a row first read late would move
    by (1-b1) / sqrt(1-b2) of an Adam step. It costs one int32 a row. Where every row has a gradient at every step, this
    is dense Adam; elsewhere it is not, since dense Adam goes on moving a row by its stale moments.
    """

    def __init__(self, assignments: Sequence[Assignment], betas: tuple[float, float], eps: float) -> None:
        super().__init__(assignments)
        self.betas = betas
        self.eps = eps
        for each in self.assignments:
            table = each.parameter
            self.tensors[f"{each.name}/first_moment"] = torch.zeros_like(table, dtype=torch.float32)
            self.tensors[f"{each.name}/second_moment"] = torch.zeros_like(table, dtype=torch.float32)
            self.tensors[f"{each.name}/row_step"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)

    def update(self, assignment: Assignment, gradient: Tensor, lr: float, seed: int) -> None:
        row_adam_(
            assignment.parameter,
            self.tensors[f"{assignment.name}/first_moment"],
            self.tensors[f"{assignment.name}/second_moment"],
            self.tensors[f"{assignment.name}/row_step"],
            gradient._values().contiguous(),
            RowPlan.of_sums(gradient._indices()[0]),
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=assignment.weight_decay,
            seed=seed,
            row_ids=row_ids(assignment, gradient),
        )
