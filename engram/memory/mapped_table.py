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
        self._pieces: list[Tensor] = []
        # First row of each piece.
        self._firsts = torch.empty(0, dtype=torch.int64)

    def place(self, pieces: list[tuple[int, Tensor]]) -> None:
        """(first row, rows [n, D]) of all rows in order, on CPU."""
        assert sum(len(rows) for _, rows in pieces) == self.num_rows
        # A piece without rows begins where the next one does.
        held = [(first, rows) for first, rows in pieces if len(rows)]
        self._pieces = [rows for _, rows in held]
        self._firsts = torch.tensor([first for first, _ in held])

    def forward(self, hash_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [..., H] int64, offsets included -> rows [..., H * D] of `dtype`, on the ids' device; id -1 is zero."""
        ids, order = hash_ids.flatten().cpu().sort()
        rows = torch.zeros(len(ids), self.head_dim, dtype=self.dtype)
        # In order, the ids of one piece stand together; dead ones come first.
        ends = torch.searchsorted(ids, torch.cat((self._firsts, torch.tensor([self.num_rows])))).tolist()
        for piece, first, start, stop in zip(self._pieces, self._firsts.tolist(), ends, ends[1:], strict=False):
            if start < stop:
                rows[order[start:stop]] = piece[ids[start:stop] - first]
        return rows.to(hash_ids.device, dtype).view(*hash_ids.shape[:-1], hash_ids.shape[-1] * self.head_dim)

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, head_dim={self.head_dim}, mapped"
