"""A table that stays in its checkpoint's files: rows are read when they are asked for, for models that only read."""

import torch
from torch import Tensor, nn


class MappedTable(nn.Module):
    """`RowTable.forward` without a gradient, from pieces of the table mapped into memory.

    What was read lately the operating system keeps; of the rest, nothing is in memory. `place` gives it its rows.
    """

    def __init__(
        self, num_rows: int, head_dim: int, *, init_std: float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """A table without rows as yet, of RowTable's arguments."""
        super().__init__()
        self.num_rows, self.head_dim, self.dtype = num_rows, head_dim, dtype
        self._pieces: list[tuple[int, Tensor]] = []

    def place(self, pieces: list[tuple[int, Tensor]]) -> None:
        """(first row, rows [n, D]) of all rows in order, on CPU."""
        assert sum(len(rows) for _, rows in pieces) == self.num_rows
        self._pieces = pieces

    def forward(self, hash_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [..., H] int64, offsets included -> rows [..., H * D] of `dtype`, on the ids' device; id -1 is zero."""
        ids = hash_ids.flatten().cpu()
        rows = torch.zeros(len(ids), self.head_dim, dtype=self.dtype)
        for first, piece in self._pieces:
            here = ((ids >= first) & (ids < first + len(piece))).nonzero().squeeze(1)
            rows[here] = piece[ids[here] - first]
        return rows.to(hash_ids.device, dtype).view(*hash_ids.shape[:-1], hash_ids.shape[-1] * self.head_dim)

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, head_dim={self.head_dim}, mapped"
