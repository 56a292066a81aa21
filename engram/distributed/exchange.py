"""Rows of divided tables on their way: ids to the ranks that own them, rows back, gradients to the owners.

All tables travel together. A step takes four messages from every rank to every rank: how many ids, the ids, their rows,
and the rows' gradients.

Legend: L tables, R ranks, U distinct rows that this rank reads of one table, A rows that all ranks ask of this one, D
width of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from engram.distributed.world import World


@dataclass
class Asked:
    """What a step's ids have in common with its rows and gradients: who asked whom for how many."""

    # Numbers of rows [rank][table]: that this rank reads of others, and that others read of it.
    wanted: list[list[int]]
    owed: list[list[int]]
    # Bytes that this rank has sent to others for it, and those of them that told how many ids would come.
    bytes_sent: int
    bytes_of_counts: int


class RowExchange:
    """Exchanges over all ranks of `world`; `ranges[table][rank]` are the rows that a rank owns, in order."""

    def __init__(self, world: World, ranges: Sequence[Sequence[range]]) -> None:
        self.world = world
        self._starts = [
            torch.tensor([rows.start for rows in owned] + [owned[-1].stop], device=world.device) for owned in ranges
        ]

    def ask(self, ids: Sequence[Tensor], valid: bool) -> tuple[Asked, list[Tensor]] | None:
        """Each table's ids int64 [U], distinct and ascending -> what all ranks ask of this one: [A], by rank.

        None, on all ranks, where `valid` is not set on any of them.
        """
        if not valid:
            ids = [each[:0] for each in ids]
        ends = [torch.searchsorted(each, starts) for each, starts in zip(ids, self._starts, strict=True)]
        # One column more than tables: whether the ids are valid.
        columns = [end.diff() for end in ends] + [torch.full((self.world.size,), int(valid), device=self.world.device)]
        counts_RL = torch.stack(columns, dim=1)
        one_each = [1] * self.world.size
        answers = self._all_to_all(counts_RL, one_each, one_each)().tolist()
        if not all(row[-1] for row in answers):
            return None
        wanted, owed = ([row[:-1] for row in table] for table in (counts_RL.tolist(), answers))
        asked = Asked(wanted, owed, 0, self._bytes_to_others(counts_RL, one_each))
        asked.bytes_sent = asked.bytes_of_counts
        parts = torch.cat(self._by_rank(ids, wanted))
        asked.bytes_sent += self._bytes_to_others(parts, _sums(wanted))
        return asked, _by_table(self._all_to_all(parts, _sums(wanted), _sums(owed))(), owed)

    def answer(self, asked: Asked, rows: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """Each table's rows [A, D], as they were asked for -> what waits for this rank's own [U, D]."""
        parts = torch.cat(self._by_rank(rows, asked.owed))
        asked.bytes_sent += self._bytes_to_others(parts, _sums(asked.owed))
        wait = self._all_to_all(parts, _sums(asked.owed), _sums(asked.wanted))
        arrived: list[Tensor] = []

        def table(place: int) -> Tensor:
            # The first that is waited for brings all.
            if not arrived:
                arrived.extend(_by_table(wait(), asked.wanted))
            return arrived[place]

        return [lambda place=place: table(place) for place in range(len(rows))]  # type: ignore[misc]

    def return_gradients(self, asked: Asked, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Each table's gradient [U, D] -> those of the rows that were asked of this rank [A, D], by rank."""
        parts = torch.cat(self._by_rank(gradients, asked.wanted))
        asked.bytes_sent += self._bytes_to_others(parts, _sums(asked.wanted))
        return _by_table(self._all_to_all(parts, _sums(asked.wanted), _sums(asked.owed))(), asked.owed)

    def _all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Callable[[], Tensor]:
        """`rows` in parts of `sent` rows, one for each rank -> what waits for parts of `received`, one from each."""
        output = rows.new_empty(sum(received), *rows.shape[1:])
        work = distributed.all_to_all_single(output, rows, received, sent, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            work.wait()
            return output

        return wait

    def _bytes_to_others(self, rows: Tensor, sent: list[int]) -> int:
        """A rank's own rows take no way."""
        return (len(rows) - sent[self.world.rank]) * rows.shape[1:].numel() * rows.itemsize

    def _by_rank(self, tables: Sequence[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """Parts of all tables, those for the first rank first."""
        parts = [table.split([row[place] for row in counts]) for place, table in enumerate(tables)]
        return [part[rank] for rank in range(self.world.size) for part in parts]


def _by_table(rows: Tensor, counts: list[list[int]]) -> list[Tensor]:
    """Each table's rows, rank by rank, of what arrived rank by rank with all tables in each."""
    parts = rows.split([count for row in counts for count in row])
    tables = len(counts[0])
    return [torch.cat(parts[place::tables]) for place in range(tables)]


def _sums(counts: list[list[int]]) -> list[int]:
    return [sum(row) for row in counts]
