"""What an update must know of a table where only some of its rows are at hand: on this rank, or in a cache."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TablePart:
    """Rows of a larger table of `num_rows` rows, held in another place or order."""

    # Rows as held, int64 [N] -> their numbers in the whole table, int64 [N].
    row_ids: Callable[[Tensor], Tensor]
    num_rows: int
    # Over all parts, which call them together: any tensor -> its sum, its maximum.
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]
