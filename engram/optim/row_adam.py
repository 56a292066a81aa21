"""Adam for tables that moves touched rows only.

Legend: U rows with a gradient, D width of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.optim.groups import Assignment
from engram.optim.role import TableRole, rows_per_chunk


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
            self.tensors[f"{each.name}/first_moment"] = torch.zeros_like(table)
            self.tensors[f"{each.name}/second_moment"] = torch.zeros_like(table)
            self.tensors[f"{each.name}/row_step"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)

    def update(self, assignment: Assignment, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        table = assignment.parameter
        first, second, row_step = (
            self.tensors[f"{assignment.name}/{state}"] for state in ("first_moment", "second_moment", "row_step")
        )
        beta1, beta2 = self.betas
        chunk = rows_per_chunk(table)
        for rows, gradient in zip(rows_U.split(chunk), gradient_UD.split(chunk), strict=True):
            step = row_step.index_select(0, rows).add_(1)
            row_step.index_copy_(0, rows, step)
            mean = first.index_select(0, rows).lerp_(gradient, 1 - beta1)
            first.index_copy_(0, rows, mean)
            square = second.index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            second.index_copy_(0, rows, square)
            # In float64, since 1 - beta^t cancels; [U, 1] against [U, D] costs nothing.
            correction1 = (1 - beta1 ** step.double()).to(table.dtype)[:, None]
            correction2 = (1 - beta2 ** step.double()).to(table.dtype)[:, None]
            update = mean.div_(correction1).div_(square.div_(correction2).sqrt_().add_(self.eps))
            weight = table.index_select(0, rows)
            if assignment.weight_decay:
                weight.mul_(1 - lr * assignment.weight_decay)
            table.index_copy_(0, rows, weight.sub_(update, alpha=lr))
