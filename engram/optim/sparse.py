"""Gradients of tables: sparse COO, where a row stands once for each time that it was read.

Legend: N reads, U distinct rows in ascending order, D width of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def sum_duplicate_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows [U] (ascending int64) and the sums of their gradients [U, D], in an order that is always the same.

    Sort, then segment sum: an embedding bag over the sorted reads sums each row's gradients in the order of their
    arrival, without atomics and without a sorted copy of the values. It gives the values of `gradient.coalesce()`.
    """
    if gradient.is_coalesced():
        return gradient._indices()[0], gradient._values()
    reads_N, values_ND = gradient._indices()[0], gradient._values()
    if reads_N.numel() == 0:
        return reads_N, values_ND
    sorted_N, order_N = torch.sort(reads_N, stable=True)
    rows_U, counts_U = torch.unique_consecutive(sorted_N, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    return rows_U, F.embedding_bag(order_N, values_ND, starts_U, mode="sum")


def coalesce(gradient: Tensor) -> Tensor:
    """The same sparse gradient with each row once."""
    rows_U, values_UD = sum_duplicate_rows(gradient)
    return torch.sparse_coo_tensor(rows_U[None], values_UD, gradient.shape, is_coalesced=True, check_invariants=False)
