"""Momentum with Sinkhorn balancing in plain torch: the specification.

Legend: R rows of the table, U rows with a gradient, D width of a row.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels.table_update.part import TablePart
from engram.kernels.table_update.rounding import round_stochastically


def sinkhorn_momentum_ref_(
    table: Tensor,
    momentum: Tensor,
    gradient_UD: Tensor,
    rows_U: Tensor,
    *,
    lr: float,
    beta: float,
    steps: int,
    threshold: float,
    update_rms: float,
    weight_decay: float,
    seed: int,
    part: TablePart | None = None,
) -> None:
    gradient_UD = gradient_UD.float() * (1 - beta)
    momentum.mul_(beta)
    momentum.index_copy_(0, rows_U, momentum.index_select(0, rows_U).add_(gradient_UD))
    lookahead_RD = momentum * beta
    lookahead_RD.index_copy_(0, rows_U, lookahead_RD.index_select(0, rows_U).add_(gradient_UD))
    balanced_RD, active_R = balance_ref(lookahead_RD, steps, threshold, part)
    keep_R1 = 1 - lr * weight_decay * active_R[:, None]
    weight_RD = table.float() * keep_R1 - lr * update_rms * math.sqrt(table.shape[1]) * balanced_RD
    if table.dtype == torch.bfloat16:
        # Rows that rest are bfloat16 numbers already, which rounding leaves alone.
        row_ids_R = torch.arange(len(table), device=table.device)
        weight_RD = round_stochastically(weight_RD, seed, part.row_ids(row_ids_R) if part else row_ids_R)
    table.copy_(weight_RD)


def balance_ref(
    matrix_RD: Tensor, steps: int, threshold: float, part: TablePart | None = None
) -> tuple[Tensor, Tensor]:
    """The matrix after `steps` alternating L2 normalisations of rows and columns, and which rows take part [R].

    The others, with a norm of at most `threshold` times the mean norm of all rows, become zero. The rows of a `part`
    are balanced with those of all other parts.
    """
    tiny = torch.finfo(matrix_RD.dtype).tiny
    # Normalisation cancels the factor, which keeps squares of small gradients from underflowing.
    largest = matrix_RD.abs().max() if len(matrix_RD) else matrix_RD.new_zeros(())
    balanced_RD = matrix_RD / (part.max(largest) if part else largest).clamp_min(tiny)
    norm_R = torch.linalg.vector_norm(balanced_RD, dim=1)
    mean_norm = part.sum(norm_R.sum()) / part.num_rows if part else norm_R.mean()
    active_R = (norm_R > threshold * mean_norm) & (norm_R > 0)
    balanced_RD = balanced_RD * active_R[:, None]
    for step in range(steps):
        if part and step % 2:
            balanced_RD = balanced_RD / _column_norms(balanced_RD, part).clamp_min(1e-20)
        else:
            balanced_RD = F.normalize(balanced_RD, dim=1 - step % 2, eps=1e-20)
    return balanced_RD, active_R


def _column_norms(matrix_RD: Tensor, part: TablePart) -> Tensor:
    """Norms of the whole table's columns [D]."""
    norm_D = torch.linalg.vector_norm(matrix_RD, dim=0, dtype=torch.float64)
    return part.sum(norm_D.square()).sqrt().to(matrix_RD.dtype)
