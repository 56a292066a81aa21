"""Tables divided among ranks by rows: each rank owns a contiguous range, and reads the others' through an exchange.

What trains them stays with the owner: gradients come back to it, summed over the reads of each rank and then over ranks
in their order, and its optimizer state never moves.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from engram.distributed.exchange import Asked, RowExchange
from engram.distributed.world import World
from engram.kernels.table_update import plan_rows, sum_rows
from engram.kernels.table_update.part import TablePart
from engram.memory.initial_rows import draw_own
from engram.memory.staged_table import StagedTable, StagedTables, check_rows, distinct
from engram.memory.staging import HashIds
from engram.memory.table import RowTable


class _Asking(NamedTuple):
    """One batch's reads of all tables, and the exchange's answer; None: a rank asked for rows that do not exist."""

    hash_ids: HashIds
    # Layer -> distinct rows [U].
    ids: dict[int, Tensor]
    answer: tuple[Asked, list[Tensor]] | None


class DividedTables(StagedTables):
    """`TableSteps` of all ranks of `world`, of whose tables `ranges[layer][rank]` are a rank's rows."""

    def __init__(self, tables: dict[int, StagedTable], ranges: Mapping[int, list[range]], world: World) -> None:
        super().__init__(tables)
        self._world = world
        self._ranges = ranges
        self._exchange = RowExchange(world, [ranges[layer] for layer in tables])
        # Of the batch that was asked for ahead.
        self._ahead: _Asking | None = None
        self._asked: Asked | None = None
        # Of the last step that was finished.
        self._bytes_sent = self._bytes_of_counts = 0
        # Of each table, the own rows that ranks asked for, rank by rank; numbered from the first own row on.
        self._reads: dict[int, Tensor] = {}

    def prefetch(self, hash_ids: HashIds) -> None:
        """Ranks tell one another now what they will read, so that owners can fetch what all of them will ask for."""
        self._ahead = self._ask(hash_ids)
        if self._ahead.answer is not None:
            for (layer, table), read in zip(self._tables.items(), self._ahead.answer[1], strict=True):
                table.owner.prefetch(distinct(read - self._ranges[layer][self._world.rank].start))

    def _ask(self, hash_ids: HashIds) -> _Asking:
        ids = {layer: distinct(hash_ids[layer]) for layer in self._tables}
        valid = all(not len(ids[layer]) or int(ids[layer][-1]) < self._tables[layer].num_rows for layer in ids)
        return _Asking(hash_ids, ids, self._exchange.ask(list(ids.values()), valid))

    def begin(self, hash_ids: HashIds) -> None:
        asking = self._ahead
        # The very same batch, not an equal one: which it is, all ranks see alike.
        if asking is None or asking.hash_ids is not hash_ids:
            asking = self._ask(hash_ids)
        else:
            self._ahead = None
        ids, answer = asking.ids, asking.answer
        if answer is None:
            with self._world.together():
                for layer, table in self._tables.items():
                    check_rows(ids[layer], table.num_rows, layer)
            raise AssertionError("one rank found its rows invalid, which are not")
        self._asked, reads = answer
        rows = []
        for (layer, table), read in zip(self._tables.items(), reads, strict=True):
            own = self._reads[layer] = read - self._ranges[layer][self._world.rank].start
            table.owner.ensure(distinct(own))
            rows.append(table.owner.read(own))
        arriving = self._exchange.answer(self._asked, rows)
        for (layer, table), wait in zip(self._tables.items(), arriving, strict=True):
            table.stage(ids[layer], wait)

    def finish(self) -> None:
        assert self._asked is not None, "a batch is finished that never began"
        gradients = [table.take_gradient()[1] for table in self._tables.values()]
        asked, self._asked = self._asked, None
        returned = self._exchange.return_gradients(asked, gradients)
        self._bytes_sent, self._bytes_of_counts = asked.bytes_sent, asked.bytes_of_counts
        for (layer, table), gradient in zip(self._tables.items(), returned, strict=True):
            # A stable sort: sums are in the order of ranks.
            plan = plan_rows(self._reads[layer])
            table.owner.accumulate(plan.rows, sum_rows(gradient, plan))

    def measures(self) -> dict[str, float]:
        sent, counts = self._bytes_sent, self._bytes_of_counts
        measures = {"tables/bytes_sent": float(sent)}
        if sent > counts:
            # Ids, rows and gradients, each once, are what a step needs to send.
            measures["tables/bytes_over_needed"] = sent / (sent - counts)
        return measures | super().measures()


class OwnRows(RowTable):
    """`RowOwner` of the rows `own` of a table of `num_rows`, all of them on the device."""

    def __init__(self, num_rows: int, head_dim: int, *, dtype: torch.dtype, own: range) -> None:
        super().__init__(len(own), head_dim, dtype=dtype)
        self._whole = num_rows
        self.own = own

    @torch.no_grad()
    def draw_rows(self, std: float) -> None:
        draw_own(self.weight, self._whole, std, self.own)

    def read(self, ids: Tensor) -> Tensor:
        # A rank may own none, and look-ups want a table with rows.
        return super().read(ids) if len(self.weight) else self.weight.detach()[ids]


def part_of(num_rows: int, own: range, world: World) -> TablePart:
    """What updates of a rank's own rows must know of the whole table."""

    def largest(tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    return TablePart(lambda ids: ids + own.start, num_rows, world.sum, largest if world.size > 1 else lambda each: each)
