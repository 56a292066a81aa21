"""What of a model each rank holds, in elements and rows: plain arithmetic, without torch.

A group is a set of backbone parameters that ZeRO treats alike; a table is divided by rows. Padding, of at most one
element a rank and group, is not counted, nor that stage 3 leaves small parameters whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engram.config import Config, NgramConfig
from engram.distributed.row_ranges import row_ranges
from engram.memory.primes import distinct_primes
from engram.model.accounting import count_parameters

FLOAT, INDEX, COUNT = 4, 8, 4
ENTRY = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Group:
    """Parameters of one optimizer, divided outright among `parts` ranks and by ZeRO among the `holders` of a part."""

    name: str
    elements: int
    # Tensors of optimizer state, each as large as the parameters: 1 for Muon, 2 for AdamW.
    moments: int
    parts: int
    holders: int

    @property
    def whole(self) -> int:
        """Elements that a rank works with."""
        return self.elements // self.parts

    def share(self, rank: int) -> int:
        """Elements that ZeRO gives to `rank`, of those that it works with."""
        stretch = -(-self.whole // self.holders)
        return max(0, min(stretch, self.whole - rank // self.parts * stretch))


@dataclass(frozen=True)
class Table:
    """An n-gram table: rows of all its heads, one head's below another's."""

    # None: that of OverEncoding.
    layer: int | None
    settings: NgramConfig
    # Length of the n-grams and number of rows of each head.
    heads: tuple[tuple[int, int], ...]
    # Rows of each rank; equal ranges where every rank holds all.
    ranges: tuple[range, ...]

    @property
    def name(self) -> str:
        return "table of over-encoding" if self.layer is None else f"table of block {self.layer}"

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.heads)

    @property
    def row_bytes(self) -> int:
        """Of the entries of a row."""
        return self.settings.head_dim * ENTRY[self.settings.table_dtype]

    def state_bytes(self, kind: str) -> int:
        """Of a row's optimizer state."""
        vector = self.settings.head_dim * FLOAT
        # Row Adam also counts each row's updates.
        sizes = {"row_adam": 2 * vector + COUNT, "rowwise_adagrad": FLOAT, "sinkhorn": vector, "dense_adam": 2 * vector}
        return sizes[kind]

    def heads_of(self, rows: range) -> Iterator[tuple[int, int, int]]:
        """(length of the n-grams, rows of the head, those of them among `rows`) of each head that has any there."""
        first = 0
        for order, count in self.heads:
            inside = min(rows.stop, first + count) - max(rows.start, first)
            if inside > 0:
                yield order, count, inside
            first += count

    def rows_at_most(self, rows: range, tokens: int) -> int:
        """Distinct rows among `rows` that so many tokens can read: each reads one row of each head."""
        return sum(min(inside, tokens) for _, _, inside in self.heads_of(rows))


def backbone_groups(config: Config, ranks: int) -> tuple[Group, ...]:
    """Hidden matrices, routed experts, and everything that is AdamW's; without the empty ones."""
    counts = count_parameters(config.model)
    experts = sum(part.parameters for part in counts.parts if part.name == "routed experts")
    moments = 1 if config.optim.muon else 2
    parts = config.distributed.expert_ranks if config.distributed else 1
    groups = (
        Group("hidden matrices", counts.roles["muon"] - experts, moments, 1, ranks),
        Group("routed experts", experts, moments, parts, ranks // parts),
        Group("vocabulary, router, vectors", counts.roles["adamw"], 2, 1, ranks),
    )
    return tuple(group for group in groups if group.elements)


def tables_of(config: Config, owners: int | None, ranks: int) -> tuple[Table, ...]:
    """All tables; their rows are divided among the first `owners` ranks, or held by every rank (None)."""

    def table(layer: int | None, settings: NgramConfig, primes: list[list[int]]) -> Table:
        heads = tuple((order, rows) for order, sizes in zip(settings.orders, primes, strict=True) for rows in sizes)
        num_rows = sum(rows for _, rows in heads)
        ranges = [range(num_rows)] * ranks if owners is None else row_ranges(num_rows, owners, ranks)
        return Table(layer, settings, heads, tuple(ranges))

    model = config.model
    found = []
    if memory := model.memory:
        sizes = distinct_primes(memory.layer_ids, memory.rows_per_head, memory.num_heads)
        found += [table(layer, memory, sizes[layer]) for layer in memory.layer_ids]
    if tables := model.over_encoding:
        [primes] = distinct_primes([0], tables.rows_per_head, tables.num_heads).values()
        found.append(table(None, tables, primes))
    return tuple(found)
