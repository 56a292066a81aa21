"""Momentum with Sinkhorn balancing, the table optimizer of DeepSeek-V4.1 (arXiv 2609.19969, section 2.5).

Legend: R rows of the table, U rows with a gradient, D width of a row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engram.config import TableOptimConfig
from engram.optim.groups import Assignment
from engram.optim.role import TableRole, rows_per_chunk


class SinkhornMomentum(TableRole):
    """M = mu M + (1-mu) G;  H = mu M + (1-mu) G;  W = W - lr update_rms sqrt(D) balanced(H).

    Balancing divides rows and columns by their L2 norms in turn and ends on rows, so that a row moves by exactly
    lr update_rms in root mean square, or not at all: rows of H whose norm is at most inactive_row_threshold times the
    mean norm of the table's rows are inactive. Momentum and one temporary are as large as the table, gradients are not.
    """

    def __init__(self, assignments: Sequence[Assignment], settings: TableOptimConfig) -> None:
        super().__init__(assignments)
        self.settings = settings
        for each in self.assignments:
            self.tensors[f"{each.name}/momentum"] = torch.zeros_like(each.parameter)

    def update(self, assignment: Assignment, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        settings, table = self.settings, assignment.parameter
        momentum = self.tensors[f"{assignment.name}/momentum"].mul_(settings.momentum)
        touched_UD = momentum.index_select(0, rows_U).add_(gradient_UD, alpha=1 - settings.momentum)
        momentum.index_copy_(0, rows_U, touched_UD)
        lookahead_RD = momentum * settings.momentum
        touched_UD = touched_UD.mul_(settings.momentum).add_(gradient_UD, alpha=1 - settings.momentum)
        lookahead_RD.index_copy_(0, rows_U, touched_UD)
        row_scale_R, column_scale_D = balance(lookahead_RD, settings.sinkhorn_steps, settings.inactive_row_threshold)
        if assignment.weight_decay:
            table.mul_(1 - lr * assignment.weight_decay * (row_scale_R > 0)[:, None])
        step_size = lr * settings.update_rms * math.sqrt(table.shape[1])
        table.addcmul_(lookahead_RD.mul_(column_scale_D), row_scale_R[:, None], value=-step_size)


def balance(matrix_RD: Tensor, steps: int, inactive_row_threshold: float) -> tuple[Tensor, Tensor]:
    """Scales such that diag(row) matrix diag(column) is `matrix` after `steps` (odd) alternating L2 normalisations.

    Row scales [R] are 0 for inactive rows, column scales [D] for columns of zeros. The matrix is not rewritten: with A
    its elementwise square, row^2 = 1 / (A column^2) normalises rows and column^2 = 1 / (A^T row^2) normalises columns.
    One sweep over the matrix does both, chunk by chunk. First divides `matrix` in place by its largest magnitude, which
    the scales cancel, so that squares of small gradients do not underflow.
    """
    tiny = torch.finfo(matrix_RD.dtype).tiny
    low, high = torch.aminmax(matrix_RD)
    matrix_RD.div_(torch.maximum(-low, high).clamp_min(tiny))
    chunk = rows_per_chunk(matrix_RD)
    row_R, column_D = matrix_RD.new_empty(len(matrix_RD)), matrix_RD.new_ones(matrix_RD.shape[1])
    matrices, rows = matrix_RD.split(chunk), row_R.split(chunk)
    for matrix, row in zip(matrices, rows, strict=True):
        torch.mv(matrix.square(), column_D, out=row)
    norm_R = row_R.sqrt()
    inactive_R = (norm_R <= inactive_row_threshold * norm_R.mean()) | (row_R < tiny)
    inactives = inactive_R.split(chunk)
    for _ in range(steps // 2):
        sums_D = torch.zeros_like(column_D)
        for matrix, row, inactive in zip(matrices, rows, inactives, strict=True):
            square = matrix.square()
            torch.mv(square, column_D, out=row).reciprocal_().masked_fill_(inactive, 0)
            sums_D += torch.mv(square.mT, row)
        column_D = torch.where(sums_D < tiny, 0, 1 / sums_D)
    for matrix, row in zip(matrices, rows, strict=True):
        torch.mv(matrix.square(), column_D, out=row)
    return row_R.rsqrt_().masked_fill_(inactive_R, 0), column_D.sqrt_()
