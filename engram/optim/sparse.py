"""Gradients of tables: sparse COO, where a row stands once for each time that it was read, until they are summed.

Rows are summed before any is moved. Clipping needs the norm of all sums first, micro-batches would pile up their reads,
and Sinkhorn balances whole rows. With N reads of U rows of width D, this moves N + 3 U times D numbers (reads, sums
written, their norm, their use), and 2 U more where they are clipped. To take the norm on the fly and sum once more
inside the update would move 2 N, in random order, and keep N instead of U until then. In the shipped configs (N =
32,768, U = 26,000, D = 16) that is 4 MB instead of 7 to 10, beside 10 MB of weights and moments; where rows are read
three times each (five, if clipped) it is no less.
"""

import torch
from torch import Tensor

from engram.kernels.table_update import plan_rows, sum_rows


def coalesce(gradient: Tensor) -> Tensor:
    """The same gradient with each row once, in ascending order: summed in float32, in an order that never changes.

    Negative rows, which are dead reads, are left out.
    """
    # Torch calls a single read coalesced, but it may be a dead one.
    if gradient.is_coalesced() and gradient._nnz() > 1:
        return gradient
    plan = plan_rows(gradient._indices()[0])
    sums = sum_rows(gradient._values().contiguous(), plan).to(gradient.dtype)
    return torch.sparse_coo_tensor(plan.rows[None], sums, gradient.shape, is_coalesced=True, check_invariants=False)


def ascending(gradient: Tensor) -> Tensor:
    """A coalesced gradient with its rows in ascending order: those of a cache come in the order of the whole table."""
    rows = gradient._indices()[0]
    if bool((rows.diff() > 0).all()):
        return gradient
    rows, order = rows.sort()
    values = gradient._values().index_select(0, order)
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, is_coalesced=True, check_invariants=False)
