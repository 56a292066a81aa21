"""The life of a step, for tables whose rows are not all at hand: the seam between training and where rows are stored.

begin(ids)                  before the first forward pass of a batch
prefetch(next batch's ids)  optional, so that its rows are fetched while this one computes
finish()                    after the last backward pass
updated()                   after the optimizer's step
flush()                     before a checkpoint
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

# Memory layer -> table rows int64 [B, T, H], offsets included, -1 for none: what `Transformer.hash_ids` gives.
HashIds = Mapping[int, Tensor]


class RowOwner(Protocol):
    """What holds rows of one table, all of them or a part, for whoever reads them by number.

    Rows are numbered from 0 here, also where they are a part of a larger table.
    """

    # Its gradient is row-sparse. It may hold fewer rows than the owner.
    weight: nn.Parameter
    # Whether the gradient is as large as `weight` instead.
    dense_gradients: bool

    def draw_rows(self, std: float) -> None:
        """Rows are those that N(0, std) gives them in the whole table."""
        ...

    def prefetch(self, ids: Tensor) -> None:
        """Distinct, ascending rows that the next `ensure` will ask for may be fetched meanwhile. Does not wait for
        them."""
        ...

    def ensure(self, ids: Tensor) -> None:
        """Distinct, ascending rows int64 [U] are read and moved from here on, until the next call."""
        ...

    def read(self, ids: Tensor) -> Tensor:
        """Rows int64 [N] -> [N, D] of the table's dtype, without a gradient."""
        ...

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        """Leave the gradient [U, D] of distinct, ascending rows [U] on `weight`, which has none so far."""
        ...

    def updated(self) -> None:
        """The optimizer has moved rows that have a gradient."""
        ...

    def flush(self) -> None:
        """Nothing is under way any more: what is stored is what was trained."""
        ...

    def measures(self) -> dict[str, float]:
        """What the last step found where: further keys of metrics.jsonl."""
        ...


class TableSteps(Protocol):
    """The tables of all memory layers of one model. Where rows are divided among ranks, all ranks call everything, in
    the same order."""

    def prefetch(self, hash_ids: HashIds) -> None:
        """Start to fetch what a later `begin` will be given: this very object. Does not wait for rows."""
        ...

    def begin(self, hash_ids: HashIds) -> None:
        """The coming forward passes, with or without a gradient, read these rows only. Raises UserError: a cache too
        small for them; IndexError: a row that a table does not have, on all ranks."""
        ...

    def finish(self) -> None:
        """Leave the batch's gradient, coalesced, on the parameters of whoever owns the rows."""
        ...

    def updated(self) -> None:
        """The optimizer has moved the rows of this step."""
        ...

    def flush(self) -> None:
        """Nothing is under way any more: what is stored is what was trained."""
        ...

    def measures(self) -> dict[str, float]:
        """What the last step asked for and got: further keys of metrics.jsonl."""
        ...
