"""Which rank owns which rows of a table."""

from itertools import pairwise
from typing import Literal

from engram.config import ConfigError


def row_ranges(num_rows: int, owners: int, ranks: int) -> list[range]:
    """The rows of each of `ranks` ranks: contiguous, in order, divided among the first `owners`.

    Owners' shares differ by one row at most; where they outnumber the rows, the last have none.
    """
    assert 0 < owners <= ranks
    each, more = divmod(num_rows, owners)
    starts = [rank * each + min(rank, more) for rank in range(owners + 1)]
    return [range(*ends) for ends in pairwise(starts)] + [range(num_rows, num_rows)] * (ranks - owners)


def table_owners(table_ranks: Literal["all"] | int, ranks: int) -> int:
    """How many ranks own rows by `distributed.table_ranks`. Raises ConfigError where there are not so many."""
    if table_ranks == "all":
        return ranks
    if table_ranks > ranks:
        raise ConfigError(
            f"distributed.table_ranks is {table_ranks}, but there are {ranks} ranks: lower it to {ranks}, or to 'all'"
        )
    return table_ranks
