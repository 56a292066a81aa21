"""Divided tables against one process: whole tables that read the batches of all ranks, one after the other.

Factors of the loss are dyadic and few: no sum of a gradient is rounded, and its order does not matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram.config import TableOptimConfig, UserError
from engram.distributed.row_ranges import row_ranges
from engram.distributed.table_parallel import DividedTables, OwnRows, part_of
from engram.distributed.world import World
from engram.kernels.table_update.part import TablePart
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable
from engram.optim.groups import Assignment
from engram.optim.optimizer import RoleOptimizer, table_role
from tests.distributed.ranks import run_ranks, values

WIDTH, HEADS = 4, 3
# Layer -> rows; ranks that own rows may outnumber them.
ROWS = {1: 37, 4: 2}
STEPS = 5
LR = 0.1


@dataclass(frozen=True)
class Case:
    owners: int
    kind: Any = "row_adam"
    dtype: torch.dtype = torch.float32

    def whole_tables(self) -> dict[int, RowTable]:
        generator = torch.Generator().manual_seed(7)
        tables = {layer: RowTable(rows, WIDTH, dtype=self.dtype) for layer, rows in ROWS.items()}
        for table in tables.values():
            with torch.no_grad():
                table.weight.normal_(generator=generator)
            table.dense_gradients = self.kind == "dense_adam"
        return tables

    def optimizer(self, weights: dict[int, nn.Parameter], parts: dict[int, TablePart | None]) -> RoleOptimizer:
        assignments = [
            Assignment(f"t{layer}", weight, "table", 2.0, 0.25, part=parts[layer]) for layer, weight in weights.items()
        ]
        settings = TableOptimConfig(kind=self.kind, eps=1e-6)
        return RoleOptimizer(assignments, [table_role(assignments, settings)])


CASES = {
    2: [Case(2), Case(1), Case(2, dtype=torch.bfloat16)],
    3: [
        Case(2, kind, dtype)
        for kind in ("row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam")
        for dtype in (torch.float32, torch.bfloat16)
        # Which only moves float32.
        if (kind, dtype) != ("dense_adam", torch.bfloat16)
    ],
    4: [Case(4), Case(3, "sinkhorn")],
}


def batch_of(rank: int, step: int, layer: int) -> tuple[Tensor, Tensor]:
    """Ids [4, 2, H] that one rank reads, some of them dead, and the factors of their rows."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * layer + rank)
    ids = torch.randint(-1, ROWS[layer], (4, 2, HEADS), generator=generator)
    if step == 1 and rank == 0 or step == 2:
        # Nothing is read by one rank, and then by all.
        ids.fill_(-1)
    return ids, torch.randint(-4, 5, (4, 2, HEADS * WIDTH), generator=generator) / 4


def read_and_backward(table: nn.Module, ids: Tensor, factors: Tensor, again: bool) -> Tensor:
    """The rows; `again`: they are read once more in the backward pass."""
    # What is computed again must depend on something with a gradient, and so must a loss that reads no row.
    scale = torch.ones((), requires_grad=True)

    def read(scale: Tensor) -> Tensor:
        return scale * table(ids, torch.float32)

    rows = checkpoint(read, scale, use_reentrant=False) if again else read(scale)
    (rows * factors).sum().backward()
    return rows.detach()


def train_divided(world: World, cases: list[Case]) -> list[tuple[list[Tensor], list[Tensor], dict[int, Tensor]]]:
    """Of each case: rows as they were read, gradients of the own rows, and the own rows at the end."""
    found = []
    for case in cases:
        ranges = {layer: row_ranges(rows, case.owners, world.size) for layer, rows in ROWS.items()}
        own = {layer: each[world.rank] for layer, each in ranges.items()}
        owners = {layer: OwnRows(rows, WIDTH, dtype=case.dtype, own=own[layer]) for layer, rows in ROWS.items()}
        for layer, whole in case.whole_tables().items():
            with torch.no_grad():
                owners[layer].weight.copy_(whole.weight[own[layer].start : own[layer].stop])
            owners[layer].dense_gradients = whole.dense_gradients
        tables = {layer: StagedTable(owners[layer], rows) for layer, rows in ROWS.items()}
        steps = DividedTables(tables, ranges, world)
        parts = {layer: part_of(rows, own[layer], world) for layer, rows in ROWS.items()}
        optimizer = case.optimizer({layer: table.weight for layer, table in tables.items()}, parts)
        reads, gradients = [], []
        for step in range(STEPS):
            batches = {layer: batch_of(world.rank, step, layer) for layer in ROWS}
            steps.begin({layer: ids for layer, (ids, _) in batches.items()})
            for first in (0, 2):
                for layer, (ids, factors) in batches.items():
                    part = slice(first, first + 2)
                    reads.append(read_and_backward(tables[layer], ids[part], factors[part], again=first == 2))
            steps.finish()
            gradients += [_dense(table.weight) for table in tables.values()]
            optimizer.step(LR)
            steps.updated()
            optimizer.zero_grad()
        found.append((reads, gradients, {layer: table.weight.detach() for layer, table in tables.items()}))
    return found


def _dense(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad.to_dense() if weight.grad.is_sparse else weight.grad.clone()


def train_whole(case: Case, ranks: int) -> tuple[list[list[Tensor]], list[Tensor], dict[int, Tensor]]:
    """Rows as each rank reads them, gradients and weights of whole tables."""
    tables = case.whole_tables()
    weights = {layer: table.weight for layer, table in tables.items()}
    optimizer = case.optimizer(weights, dict.fromkeys(weights))
    reads: list[list[Tensor]] = [[] for _ in range(ranks)]
    gradients = []
    for step in range(STEPS):
        for rank in range(ranks):
            for first in (0, 2):
                for layer, table in tables.items():
                    ids, factors = (each[first : first + 2] for each in batch_of(rank, step, layer))
                    reads[rank].append(read_and_backward(table, ids, factors, again=False))
        gradients += [_dense(weight) for weight in weights.values()]
        optimizer.step(LR)
        optimizer.zero_grad()
    return reads, gradients, {layer: weight.detach() for layer, weight in weights.items()}


@pytest.mark.parametrize("ranks", CASES)
def test_divided_tables_train_as_whole_ones(tmp_path: Path, ranks: int) -> None:
    results = values(run_ranks(ranks, train_divided, CASES[ranks], folder=tmp_path))
    for number, case in enumerate(CASES[ranks]):
        reads, gradients, weights = train_whole(case, ranks)
        divided = [result[number] for result in results]
        # Norms of columns are sums over ranks; whole tables are moved in other vectors than parts of them. What
        # differs is rounded to a neighbour in bfloat16.
        exact = case.kind in ("row_adam", "rowwise_adagrad")
        tolerance = 0.0 if exact else 1e-6 if case.dtype == torch.float32 else 2e-2
        for rank, (ours, _, _) in enumerate(divided):
            assert len(ours) == len(reads[rank]) == STEPS * 2 * len(ROWS)
            for actual, expected in zip(ours, reads[rank], strict=True):
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        for place, expected in enumerate(gradients):
            assert torch.equal(torch.cat([ours[place] for _, ours, _ in divided]), expected)
        for layer, expected in weights.items():
            together = torch.cat([ours[layer] for _, _, ours in divided])
            torch.testing.assert_close(together, expected, rtol=tolerance, atol=tolerance, msg=f"{case}, {layer}")
            assert not torch.equal(together, case.whole_tables()[layer].weight)


# ---------------------------------------------------------------------------------------------------- a stand-in's rows


class Numbers:
    """`RowOwner` of rows that tell their own numbers, however many there are."""

    dense_gradients = False

    def __init__(self, own: range, width: int) -> None:
        self.own = own
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.prefetched: list[int] = []
        self.ensured: list[int] = []
        self.gradient: dict[int, list[float]] = {}

    def prefetch(self, ids: Tensor) -> None:
        self.prefetched = ids.tolist()

    def ensure(self, ids: Tensor) -> None:
        self.ensured = ids.tolist()

    def read(self, ids: Tensor) -> Tensor:
        return number_rows(ids + self.own.start, self.weight.shape[1])

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        self.gradient = dict(zip(ids.tolist(), gradient.tolist(), strict=True))

    def draw_rows(self, std: float) -> None: ...

    def updated(self) -> None: ...

    def flush(self) -> None: ...

    def measures(self) -> dict[str, float]:
        return {"tables/hit_rate": 0.25 * len(self.ensured)}


def number_rows(ids: Tensor, width: int) -> Tensor:
    """Exact in float32: both halves of each number, over and over."""
    return torch.stack((ids // 2**20, ids % 2**20), -1).float().repeat(1, width // 2)


def stand_ins(world: World, ranges: dict[int, list[range]], width: int) -> tuple[DividedTables, dict[int, StagedTable]]:
    tables = {layer: StagedTable(Numbers(each[world.rank], width), each[-1].stop) for layer, each in ranges.items()}
    return DividedTables(tables, ranges, world), tables


HUGE = 3 * 2**33


def ids_of_huge(rank: int) -> Tensor:
    """[1, 3, H], with rows on both sides of 2^31, of 2^32 and of the owners' limits; the last is read by all."""
    ids = [[-1, 0, 2**31 - 1], [2**31, 2**32, 2**33 - 1], [2**33 + rank, 2**34 - 1, HUGE - 1]]
    return torch.tensor([ids])


def read_beyond_32_bits(world: World) -> dict[str, Any]:
    steps, tables = stand_ins(world, {2: row_ranges(HUGE, 3, 3)}, 2)
    ids = ids_of_huge(world.rank)
    ahead = {2: ids}
    steps.prefetch(ahead)
    # An evaluation comes in between.
    steps.begin({2: ids[:, :1]})
    steps.begin(ahead)
    rows = tables[2](ids, torch.float32)
    (rows * (world.rank + 1)).sum().backward()
    steps.finish()
    owner = tables[2].owner
    assert isinstance(owner, Numbers)
    return {
        "rows": rows.detach(),
        "prefetched": owner.prefetched,
        "ensured": owner.ensured,
        "gradient": owner.gradient,
        "hit_rate": steps.measures()["tables/hit_rate"],
    }


def check_beyond_32_bits(results: list[dict[str, Any]]) -> None:
    ids = [ids_of_huge(rank) for rank in range(3)]
    for rank, (result, own) in enumerate(zip(results, row_ranges(HUGE, 3, 3), strict=True)):
        flat = ids[rank].flatten()
        expected = torch.where((flat >= 0)[:, None], number_rows(flat, 2), 0.0).view(1, 3, 6)
        assert torch.equal(result["rows"], expected)
        # Own rows are numbered from the first of them on.
        mine = [[each - own.start for each in other.flatten().tolist() if each in own] for other in ids]
        assert result["prefetched"] == result["ensured"] == sorted({each for other in mine for each in other})
        assert result["gradient"] == {
            each: 2 * [sum(reader + 1.0 for reader, other in enumerate(mine) if each in other)]
            for each in result["ensured"]
        }
        assert result["hit_rate"] == 0.25 * len(result["ensured"])


READS, TABLE_ROWS = 4000, 50_000


def rows_read(rank: int, layer: int) -> Tensor:
    """READS distinct rows, every other one of them twice."""
    ids = torch.randperm(TABLE_ROWS, generator=torch.Generator().manual_seed(10 * layer + rank))[:READS]
    return torch.cat((ids, ids[::2])).view(1, -1, HEADS)


def bytes_of_a_step(world: World) -> dict[str, float]:
    steps, tables = stand_ins(world, {layer: row_ranges(TABLE_ROWS, 3, 3) for layer in (0, 5)}, 16)
    reads = {layer: rows_read(world.rank, layer) for layer in tables}
    for _ in range(2):
        steps.begin(reads)
        # What the next step sends is not counted in this one.
        steps.prefetch(reads)
        for layer, table in tables.items():
            table(rows_read(world.rank, layer), torch.float32).sum().backward()
        steps.finish()
    return steps.measures()


def check_bytes(measured: list[dict[str, float]]) -> None:
    needed = [0] * 3
    owner = [rank for rank, rows in enumerate(row_ranges(TABLE_ROWS, 3, 3)) for _ in rows]
    for layer in (0, 5):
        for reader in range(3):
            for each in set(rows_read(reader, layer).flatten().tolist()):
                if owner[each] != reader:
                    # Its number and its gradient one way, the row the other.
                    needed[reader] += 8 + 64
                    needed[owner[each]] += 64
    for rank, measures in enumerate(measured):
        assert needed[rank] <= measures["tables/bytes_sent"] <= 1.05 * needed[rank]
        assert measures["tables/bytes_over_needed"] == measures["tables/bytes_sent"] / needed[rank]


def fail_and_go_on(world: World) -> tuple[str, list[float]]:
    steps, tables = stand_ins(world, {layer: row_ranges(10, 3, 3) for layer in (0, 5)}, 2)
    good = torch.tensor([[[0, 3, 9]]])
    bad = torch.tensor([[[0, 12, 10]]])
    complaint = "none"
    try:
        steps.begin({0: good, 5: bad if world.rank == 1 else good})
    except (IndexError, UserError) as error:
        complaint = f"{type(error).__name__}: {error}"
    steps.begin({0: good, 5: good})
    return complaint, tables[5](good, torch.float32).flatten().tolist()


def check_failure(results: list[tuple[str, list[float]]]) -> None:
    what = "row 12 was asked for, but the table of layer 5 has 10 rows"
    other = f"RankError: rank 1: {what}"
    assert [complaint for complaint, _ in results] == [other, f"IndexError: {what}", other]
    assert all(rows == [0, 0, 0, 3, 0, 9] for _, rows in results)


def draw(world: World) -> list[Tensor]:
    torch.manual_seed(3)
    drawn = []
    for owners in (3, 2):
        own = row_ranges(100, owners, world.size)[world.rank]
        table = OwnRows(100, WIDTH, dtype=torch.float32, own=own)
        table.draw_rows(0.5)
        drawn.append(table.weight.detach())
    return drawn


def check_drawn(results: list[list[Tensor]]) -> None:
    torch.manual_seed(3)
    for number in range(2):
        whole = RowTable(100, WIDTH, init_std=0.5).weight
        assert torch.equal(torch.cat([drawn[number] for drawn in results]), whole)


ONE_WORLD = [
    (read_beyond_32_bits, check_beyond_32_bits),
    (bytes_of_a_step, check_bytes),
    (fail_and_go_on, check_failure),
    (draw, check_drawn),
]


def all_of(world: World) -> list[Any]:
    return [function(world) for function, _ in ONE_WORLD]


@pytest.fixture(scope="module")
def one_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[Any]]]:
    """What each rank found, by function: worlds take long to start."""
    yield values(run_ranks(3, all_of, folder=tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize("number", range(len(ONE_WORLD)), ids=[function.__name__ for function, _ in ONE_WORLD])
def test_in_one_world(one_world: list[list[Any]], number: int) -> None:
    ONE_WORLD[number][1]([found[number] for found in one_world])
