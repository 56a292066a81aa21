"""A table of which the rows of one batch are at hand: read from whoever owns them, once for all forward passes.

Legend: U distinct rows of the batch, D width of a row, H columns of hash ids.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engram.kernels.table_update import plan_rows, sum_rows
from engram.memory.staging import HashIds, RowOwner
from engram.memory.table import read_rows


class StagedTable(nn.Module):
    """`RowTable.forward` over the rows staged for a batch; their gradient waits for `take_gradient`.

    `weight`, which optimizers move and checkpoints name, is the owner's.
    """

    def __init__(self, owner: RowOwner, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.weight = owner.weight
        # Not a submodule: parameters keep the names that they have in a table of one process.
        self._owner = (owner,)
        self._ids: Tensor | None = None
        self._rows: Tensor | None = None
        self._arriving: Callable[[], Tensor] | None = None

    @property
    def owner(self) -> RowOwner:
        return self._owner[0]

    @property
    def dense_gradients(self) -> bool:
        """Whether the owner's gradient is as large as its part of the table."""
        return self.owner.dense_gradients

    @dense_gradients.setter
    def dense_gradients(self, dense: bool) -> None:
        self.owner.dense_gradients = dense

    def draw_rows(self, std: float) -> None:
        """The owner's rows are those that N(0, std) gives them in the whole table."""
        self.owner.draw_rows(std)

    def forward(self, hash_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [..., H] int64, offsets included, all of them staged -> rows [..., H * D] of `dtype`."""
        assert self._ids is not None, "the rows of this batch were not staged: call begin(hash_ids) first"
        leaf = self.leaf
        if not len(self._ids):
            return leaf.new_zeros(*hash_ids.shape[:-1], hash_ids.shape[-1] * leaf.shape[1], dtype=dtype)
        places = torch.searchsorted(self._ids, hash_ids).clamp_(max=len(self._ids) - 1)
        alive = hash_ids >= 0
        torch._assert_async(((self._ids[places] == hash_ids) | ~alive).all(), "a row was read that was not staged")
        return read_rows(leaf, torch.where(alive, places, -1), dtype, False)

    def stage(self, ids: Tensor, rows: Callable[[], Tensor]) -> None:
        """`ids` int64 [U] distinct and ascending; `rows` gives [U, D] when a forward pass first needs them."""
        assert self._rows is None or self._rows.grad is None, "a batch began before finish() took the gradient"
        self._ids, self._rows, self._arriving = ids, None, rows

    def unstage(self) -> None:
        """No row is staged any more."""
        self._ids = self._rows = self._arriving = None

    @property
    def leaf(self) -> Tensor:
        """The staged rows [U, D]; backward passes leave their gradient on them, row-sparse."""
        if self._arriving is not None:
            rows, self._arriving = self._arriving(), None
            # A read is not rounded before it is summed.
            rows.requires_grad_().grad_dtype = torch.float32
            self._rows = rows
        assert self._rows is not None
        return self._rows

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """The staged ids [U], and the sums over all reads of each row: float32 [U, D]."""
        assert self._ids is not None
        rows = self.leaf
        gradient, rows.grad = rows.grad, None
        total = torch.zeros(rows.shape, device=rows.device)
        if gradient is not None:
            plan = plan_rows(gradient._indices()[0])
            total.index_copy_(0, plan.rows, sum_rows(gradient._values().contiguous(), plan))
        return self._ids, total

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, head_dim={self.weight.shape[1]}"


class StagedTables:
    """`TableSteps` where each owner holds all rows of its table."""

    def __init__(self, tables: dict[int, StagedTable]) -> None:
        self._tables = tables

    def prefetch(self, hash_ids: HashIds) -> None:
        for layer, table in self._tables.items():
            table.owner.prefetch(distinct(hash_ids[layer]))

    def begin(self, hash_ids: HashIds) -> None:
        for layer, table in self._tables.items():
            ids = distinct(hash_ids[layer])
            check_rows(ids, table.num_rows, layer)
            table.owner.ensure(ids)
            rows = table.owner.read(ids)
            table.stage(ids, lambda rows=rows: rows)  # type: ignore[misc]

    def finish(self) -> None:
        for table in self._tables.values():
            table.owner.accumulate(*table.take_gradient())

    def updated(self) -> None:
        for table in self._tables.values():
            table.owner.updated()
            # What was staged is what rows were before they moved.
            table.unstage()

    def flush(self) -> None:
        for table in self._tables.values():
            table.owner.flush()

    def measures(self) -> dict[str, float]:
        owned = [table.owner.measures() for table in self._tables.values()]
        return {key: sum(each[key] for each in owned) / len(owned) for key in (owned[0] if owned else {})}


def distinct(hash_ids: Tensor) -> Tensor:
    """Rows that are read, int64 [U], ascending."""
    return plan_rows(hash_ids).rows


def check_rows(ids: Tensor, num_rows: int, layer: int) -> None:
    """Raises IndexError where the largest of ascending `ids` is no row."""
    if len(ids) and int(ids[-1]) >= num_rows:
        raise IndexError(f"row {int(ids[-1])} was asked for, but the table of layer {layer} has {num_rows} rows")
