"""Gradients of tables: sparse COO, where a row stands once for each time that it was read."""

import torch
from torch import Tensor

from engram.kernels.table_update import RowPlan, plan_rows, sum_rows


def plan_gradient(gradient: Tensor) -> RowPlan:
    """Which of the gradient's values belong to which row."""
    rows = gradient._indices()[0]
    if not gradient.is_coalesced():
        return plan_rows(rows)
    counting = torch.arange(len(rows) + 1, device=rows.device)
    return RowPlan(rows, counting, counting[:-1], len(rows))


def coalesce(gradient: Tensor) -> Tensor:
    """The same gradient with each row once, in ascending order: summed in float32, in an order that never changes."""
    if gradient.is_coalesced():
        return gradient
    plan = plan_gradient(gradient)
    sums = sum_rows(gradient._values().contiguous(), plan).to(gradient.dtype)
    return torch.sparse_coo_tensor(plan.rows[None], sums, gradient.shape, is_coalesced=True, check_invariants=False)
