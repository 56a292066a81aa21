"""Updates of the rows that were read, in plain torch: the specification.

Legend: R rows of the table, N reads, U distinct rows that were read, D width of a row.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels.table_update.rounding import round_stochastically


class RowPlan(NamedTuple):
    """Which reads belong to which row: row `rows[u]` was read at positions `order[starts[u] : starts[u + 1]]`."""

    # int64 [U], ascending and distinct.
    rows: Tensor
    # int64 [U + 1], from 0 to the number of living reads.
    starts: Tensor
    # int64: positions of the living reads, in order of their row, then of their arrival.
    order: Tensor
    # All reads N, the dead ones (negative ids) included: the rows that a gradient has.
    num_reads: int

    @classmethod
    def of_sums(cls, rows_U: Tensor) -> Self:
        """The plan of gradients that are summed already: one read of each of the distinct, ascending rows."""
        places = torch.arange(len(rows_U) + 1, device=rows_U.device)
        return cls(rows_U, places, places[:-1], len(rows_U))


def plan_rows_ref(ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a RowPlan by a stable sort."""
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    dead = int((ids_N < 0).sum())
    rows_U, counts_U = torch.unique_consecutive(sorted_N[dead:], return_counts=True)
    starts = F.pad(counts_U.cumsum(0), (1, 0))
    return rows_U, starts, order_N[dead:].clone()


def sum_rows_ref(gradient_ND: Tensor, plan: RowPlan) -> Tensor:
    """Sums of each row's gradients, float32 [U, D], in the order of their arrival."""
    if not len(plan.rows):
        return gradient_ND.new_zeros(0, gradient_ND.shape[1], dtype=torch.float32)
    return F.embedding_bag(plan.order, gradient_ND.float(), plan.starts[:-1], mode="sum")


def row_adam_ref_(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_step: Tensor,
    gradient_ND: Tensor,
    plan: RowPlan,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
    row_ids: Tensor,
) -> None:
    rows, gradient_UD = plan.rows, sum_rows_ref(gradient_ND, plan)
    beta1, beta2 = betas
    step_U = row_step.index_select(0, rows).add_(1)
    row_step.index_copy_(0, rows, step_U)
    mean_UD = first.index_select(0, rows).lerp_(gradient_UD, 1 - beta1)
    first.index_copy_(0, rows, mean_UD)
    square_UD = second.index_select(0, rows).mul_(beta2).addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
    second.index_copy_(0, rows, square_UD)
    # In float64, since 1 - beta^t cancels; [U, 1] against [U, D] costs nothing.
    correction1 = (1 - beta1 ** step_U.double()).float()[:, None]
    correction2 = (1 - beta2 ** step_U.double()).float()[:, None]
    update_UD = mean_UD.div_(correction1).div_(square_UD.div_(correction2).sqrt_().add_(eps))
    _move(table, rows, update_UD.mul_(lr), 1 - lr * weight_decay, seed, row_ids)


def rowwise_adagrad_ref_(
    table: Tensor,
    square_sum: Tensor,
    gradient_ND: Tensor,
    plan: RowPlan,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
    row_ids: Tensor,
) -> None:
    rows, gradient_UD = plan.rows, sum_rows_ref(gradient_ND, plan)
    sum_U = square_sum.index_select(0, rows).add_(gradient_UD.square().mean(dim=1))
    square_sum.index_copy_(0, rows, sum_U)
    step_size_U1 = (lr / sum_U.sqrt_().add_(eps))[:, None]
    _move(table, rows, gradient_UD.mul_(step_size_U1), 1 - lr * weight_decay, seed, row_ids)


def _move(table: Tensor, rows_U: Tensor, update_UD: Tensor, keep: float, seed: int, row_ids_U: Tensor) -> None:
    """w = keep w - update on some rows, rounded as the table's dtype asks."""
    weight_UD = table.index_select(0, rows_U).float().mul_(keep).sub_(update_UD)
    if table.dtype == torch.bfloat16:
        weight_UD = round_stochastically(weight_UD, seed, row_ids_U)
    table.index_copy_(0, rows_U, weight_UD)
