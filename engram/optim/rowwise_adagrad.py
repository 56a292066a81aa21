"""Row-wise Adagrad: one float32 of state for each row of a table.

Legend: U rows with a gradient, D width of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.optim.groups import Assignment
from engram.optim.role import TableRole


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

    def update(self, assignment: Assignment, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        table, square_sum = assignment.parameter, self.tensors[f"{assignment.name}/square_sum"]
        sum_U = square_sum.index_select(0, rows_U).add_(gradient_UD.square().mean(dim=1))
        square_sum.index_copy_(0, rows_U, sum_U)
        step_size_U1 = (lr / sum_U.sqrt_().add_(self.eps))[:, None]
        weight_UD = table.index_select(0, rows_U)
        if assignment.weight_decay:
            weight_UD.mul_(1 - lr * assignment.weight_decay)
        table.index_copy_(0, rows_U, weight_UD.addcmul_(gradient_UD, step_size_U1, value=-1))
