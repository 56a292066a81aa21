"""Hash ids -> rows: the parameter, and the only place that knows where rows are stored."""

from typing import Any

import torch
from torch import nn

from engram.kernels.engram_lookup import advise_huge_pages, gather_rows


class RowTable(nn.Module):
    """rows[..., h*head_dim : (h+1)*head_dim] = weight[ids[..., h]]; id -1 reads a zero row.

    `weight` [num_rows, head_dim] is float32 or bfloat16. Its gradient is a sparse COO tensor with one (uncoalesced) row
    for each id that is not -1, so a step costs what it touches; `dense_gradients = True` asks for table-sized gradients
    instead. Other storage (rows divided among ranks, host memory) is another module with this `forward`.
    """

    def __init__(
        self, num_rows: int, head_dim: int, *, init_std: float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Rows are N(0, init_std); None leaves them uninitialised, for whoever initialises the whole model."""
        super().__init__()
        self.dense_gradients = False
        weight = torch.empty(num_rows, head_dim, dtype=dtype)
        advise_huge_pages(weight)
        self.weight = nn.Parameter(weight)
        if init_std is not None:
            self.draw_rows(init_std)

    @property
    def leaf(self) -> torch.Tensor:
        """What backward passes leave their gradient on."""
        return self.weight

    @torch.no_grad()
    def draw_rows(self, std: float) -> None:
        """Rows are N(0, std)."""
        self.weight.normal_(std=std)

    def forward(self, hash_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids [..., heads] int64, offsets included -> rows [..., heads * head_dim] of `dtype`."""
        return read_rows(self.weight, hash_ids, dtype, self.dense_gradients)

    # ------------------------------------------------------------------------------------- RowOwner (memory/staging.py)

    def prefetch(self, ids: torch.Tensor) -> None:
        """All rows are here."""

    def ensure(self, ids: torch.Tensor) -> None:
        """All rows are here."""

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [N] -> rows [N, D] of the table's dtype, without a gradient."""
        return gather_rows(self.weight, ids[:, None])

    def accumulate(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """Leave the gradient [U, D] of distinct, ascending rows int64 [U] on `weight.grad`, which is empty so far."""
        assert self.weight.grad is None
        gradient = gradient.to(self.weight.grad_dtype or self.weight.dtype)
        sparse = torch.sparse_coo_tensor(
            ids[None], gradient, self.weight.shape, is_coalesced=True, check_invariants=False
        )
        self.weight.grad = sparse.to_dense() if self.dense_gradients else sparse

    def updated(self) -> None:
        """Rows are stored where they are moved."""

    def flush(self) -> None:
        """Rows are stored where they are moved."""

    def measures(self) -> dict[str, float]:
        """Nothing that could be missed."""
        return {}

    def extra_repr(self) -> str:
        return f"rows={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"


# Sparse gradients cannot be traced: the look-up stands between the compiled parts of a model.
@torch.compiler.disable
def read_rows(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, dense_gradients: bool) -> torch.Tensor:
    """Rows of a leaf `weight` [R, D], whose gradient is sparse unless asked otherwise: ids [..., H] -> [..., H * D]."""
    return _ReadRows.apply(weight, ids, dtype, dense_gradients)


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, dense: bool) -> torch.Tensor:
        ctx.save_for_backward(ids)
        # Optimizers give bfloat16 tables float32 gradients: a read is not rounded before it is summed.
        ctx.table_shape, ctx.grad_dtype, ctx.dense = weight.shape, weight.grad_dtype or weight.dtype, dense
        return gather_rows(weight, ids, dtype=dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        ids = ids.flatten()
        grad = grad.to(ctx.grad_dtype).reshape(len(ids), -1)
        if ctx.dense:
            # Sums in a fixed order, which index_add_ on a GPU does not, and leaves out the "padding" id -1.
            dense = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.table_shape[0], -1, False)
            return dense, None, None, None
        # Leaving out dead ids makes sizes depend on data: on a GPU, the host would wait for it.
        ids, grad = (_drop_dead if ids.device.type == "cpu" else _neutralise_dead)(ids, grad)
        # A view of its own lets autograd keep these values instead of copying them.
        sparse = torch.sparse_coo_tensor(ids[None], grad.view_as(grad), ctx.table_shape, check_invariants=False)
        return sparse, None, None, None


def _drop_dead(ids: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alive = ids >= 0
    return (ids, grad) if alive.all() else (ids[alive], grad[alive])


def _neutralise_dead(ids: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dead ids join a row that was read anyway, with a gradient of zero; they stay negative if nothing was read at all.

    No row may stand for them then: row Adam would move it by the moments of earlier steps. Sums by row leave negative
    ids out (engram.optim.sparse).
    """
    if not len(ids):
        return ids, grad
    dead = ids < 0
    return torch.where(dead, ids.amax(), ids), grad.masked_fill(dead[:, None], 0)
