"""Hash ids -> rows: the parameter, and the only place that knows where rows are stored."""

from typing import Any

import torch
from torch import nn


class RowTable(nn.Module):
    """rows[..., h*head_dim : (h+1)*head_dim] = weight[ids[..., h]]; id -1 reads a zero row.

    The gradient of `weight` is a sparse COO tensor with one (uncoalesced) row for each id that is not -1, so a step
    costs what it touches; `dense_gradients = True` asks for table-sized gradients instead. Other storage (rows sharded
    over ranks, host memory) is another module with this `forward`.
    """

    def __init__(self, num_rows: int, head_dim: int, *, init_std: float = 1.0) -> None:
        super().__init__()
        self.dense_gradients = False
        self.weight = nn.Parameter(torch.empty(num_rows, head_dim))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, hash_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids [..., heads] int64, offsets included -> rows [..., heads * head_dim] of `dtype`."""
        return _read(self.weight, hash_ids, dtype, self.dense_gradients)

    def extra_repr(self) -> str:
        return f"rows={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"


# Sparse gradients cannot be traced: the look-up stands between the compiled parts of a model.
@torch.compiler.disable
def _read(weight: torch.Tensor, hash_ids: torch.Tensor, dtype: torch.dtype, dense_gradients: bool) -> torch.Tensor:
    rows = _ReadRows.apply(weight, hash_ids.flatten(), dtype, dense_gradients)
    return rows.view(*hash_ids.shape[:-1], hash_ids.shape[-1] * weight.shape[1])


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, dense: bool) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.table_shape, ctx.table_dtype, ctx.dense = weight.shape, weight.dtype, dense
        # index_select reads several times faster than weight[ids] on CPU.
        rows = weight.index_select(0, ids.clamp(min=0)).to(dtype)
        dead = ids < 0
        # On CPU it is cheaper to look first; elsewhere, looking would wait for the device.
        if ids.device.type != "cpu" or dead.any():
            rows.masked_fill_(dead[:, None], 0)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        grad = grad.to(ctx.table_dtype)
        if ctx.dense:
            # Sums in a fixed order, which index_add_ on a GPU does not, and leaves out the "padding" id -1.
            dense = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.table_shape[0], -1, False)
            return dense, None, None, None
        alive = ids >= 0
        if not alive.all():
            ids, grad = ids[alive], grad[alive]
        # A view of its own lets autograd keep these values instead of copying them.
        sparse = torch.sparse_coo_tensor(ids[None], grad.view_as(grad), ctx.table_shape, check_invariants=False)
        return sparse, None, None, None
