"""Memory tables as a config stores them: whole on every rank, divided among ranks, cached from host memory or files.

From here come the tables of a model, what tells them of a step, and their way into a checkpoint and back, in slices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engram.config import Config
from engram.distributed.row_ranges import row_ranges, table_owners
from engram.distributed.table_parallel import DividedTables, OwnRows, part_of
from engram.distributed.world import World
from engram.kernels.table_update.part import TablePart
from engram.memory.row_cache import WEIGHT, CachedRows
from engram.memory.row_store import FileStore, HostStore
from engram.memory.staged_table import StagedTable, StagedTables
from engram.memory.staging import RowOwner, TableSteps
from engram.memory.table import RowTable
from engram.optim.optimizer import check_saved
from engram.training.tensor_files import TensorFiles, row_slices, rows_at_once


class StoredTables:
    """What stands behind a model's memory tables; nothing where each is whole and on the device."""

    def __init__(self, config: Config, world: World) -> None:
        """`config` is that of a Plan: its settings go together."""
        self._config = config
        self._world = world
        dividing = config.distributed.table_ranks if config.distributed else None
        self._owners = table_owners(dividing, world.size) if dividing is not None else 1
        self.divided = dividing is not None
        self.staged = config.model.memory is not None and (self.divided or config.train.tables is not None)
        self._tables: dict[int, StagedTable] = {}
        self._ranges: dict[int, list[range]] = {}
        self._optimizer: dict[str, Tensor] = {}

    def make(
        self, num_rows: int, head_dim: int, *, init_std: float | None = None, dtype: torch.dtype = torch.float32
    ) -> RowTable | StagedTable:
        """The table of the next memory layer; the `table` of a Transformer."""
        if not self.staged:
            return RowTable(num_rows, head_dim, init_std=init_std, dtype=dtype)
        assert self._config.model.memory is not None
        layer = self._config.model.memory.layer_ids[len(self._tables)]
        self._ranges[layer] = row_ranges(num_rows, self._owners, self._world.size)
        if not self.divided:
            self._ranges[layer] = [range(num_rows)] * self._world.size
        table = StagedTable(self._owner(layer, num_rows, head_dim, dtype), num_rows)
        if init_std is not None:
            table.draw_rows(init_std)
        self._tables[layer] = table
        return table

    def _owner(self, layer: int, num_rows: int, width: int, dtype: torch.dtype) -> RowOwner:
        own, stored = self._ranges[layer][self._world.rank], self._config.train.tables
        if stored is None:
            return OwnRows(num_rows, width, dtype=dtype, own=own)
        store: HostStore | FileStore = HostStore()
        if stored.tier == "file":
            store = FileStore(Path(stored.folder or self._config.run_dir).expanduser())
        return CachedRows(
            num_rows, width, dtype=dtype, own=own, slots=stored.cache_rows, store=store, name=_name(layer)
        )

    @property
    def steps(self) -> TableSteps | None:
        """None where every row is at hand."""
        if not self.staged:
            return None
        return DividedTables(self._tables, self._ranges, self._world) if self.divided else StagedTables(self._tables)

    # -------------------------------------------------------------------------------------------------------- optimizer

    def parts(self) -> dict[str, TablePart]:
        """What each table's parameter holds of it, by the parameter's name."""
        return {_name(layer): self._part(layer, table) for layer, table in self._tables.items()}

    def _part(self, layer: int, table: StagedTable) -> TablePart:
        own = self._ranges[layer][self._world.rank]
        part = part_of(table.num_rows, own, self._world)
        owner = table.owner
        return replace(part, row_ids=owner.row_ids) if isinstance(owner, CachedRows) else part

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`, keyed `<parameter>/<state>`, hold what the optimizer keeps for each row."""
        for layer, table in self._tables.items():
            prefix = _name(layer) + "/"
            states = {key: each for key, each in tensors.items() if key.startswith(prefix)}
            self._optimizer |= states
            if isinstance(table.owner, CachedRows):
                table.owner.bind({key.removeprefix(prefix): each for key, each in states.items()})

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @property
    def names(self) -> set[str]:
        """Of the parameters whose tensors are parts, or caches."""
        return {_name(layer) for layer in self._tables}

    def owns(self, key: str) -> bool:
        """Whether `key` names rows of these tables, weights or state."""
        return key in self.names or key.rpartition("/")[0] in self.names

    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole tables."""
        return {
            _name(layer): torch.Size((table.num_rows, table.weight.shape[1])) for layer, table in self._tables.items()
        }

    def slices(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """This rank's rows of `model` or `optim`, as (name[first:stop], rows) of bounded size."""
        for layer, table in self._tables.items():
            first = self._ranges[layer][self._world.rank].start
            if not self.divided and not self._world.is_first:
                continue
            for name, rows in self._rows_of(layer, table, kind):
                yield from row_slices(name, rows, first)

    def load(self, kind: str, saved: TensorFiles) -> None:
        """Take over this rank's rows of `model` or `optim`.

        Raises OptimizerStateError: state of another shape or dtype. Weights were compared before (Checkpoint.check).
        """
        shapes = saved.shapes()
        for layer, table in self._tables.items():
            own = self._ranges[layer][self._world.rank]
            for name, rows in self._rows_of(layer, table, kind):
                for first, values in saved.rows(name, own.start, own.stop, rows_at_once(rows)):
                    if kind == "optim":
                        whole = (table.num_rows, *rows.shape[1:])
                        check_saved(name, shapes[name], values.dtype, whole, rows.dtype)
                    if isinstance(table.owner, CachedRows):
                        table.owner.load(_within(name), first - own.start, values)
                    else:
                        rows[first - own.start : first - own.start + len(values)] = values

    def _rows_of(self, layer: int, table: StagedTable, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, own rows) of the weights, or of each state."""
        name, owner = _name(layer), table.owner
        states = [key for key in self._optimizer if key.startswith(name + "/")]
        for key in [name] if kind == "model" else states:
            if isinstance(owner, CachedRows):
                yield key, owner.stored[_within(key)]
            else:
                yield key, table.weight.detach() if key == name else self._optimizer[key]


def _name(layer: int) -> str:
    return f"blocks.{layer}.memory.embed.weight"


def _within(key: str) -> str:
    """What an owner calls the tensor that checkpoints name `key`."""
    return key.rpartition("/")[2] if "/" in key else WEIGHT
