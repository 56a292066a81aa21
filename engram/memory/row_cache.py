"""A table larger than the device: a cache of rows there, with what the optimizer keeps for each; all rows in a store.

Rows that a step lacks are read from the store and take the places of those used longest ago, which are written back
where they were moved. One thread does both, in the order in which it is asked to: who reads a row after it was written
back reads what was written.

On a GPU, rows that are fetched ahead also travel to it ahead, on a stream of their own.

Legend: R rows of the table, C slots of the cache, U distinct rows of a step, D width of a row.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.config import UserError
from engram.memory.initial_rows import draw_own
from engram.memory.row_store import FileStore, HostStore

WEIGHT = "weight"
# Of rows that are written back at once before a checkpoint.
FLUSH_BYTES = 2**28


class _Values(NamedTuple):
    """Stored rows by the name of their tensor, on the cache's device; on a GPU, once `arrived` has happened."""

    rows: dict[str, Tensor]
    arrived: torch.cuda.Event | None


class _Fetched(NamedTuple):
    """Rows that are on their way from the store: their numbers [N], ascending, and their values."""

    ids: Tensor
    values: Future[_Values]


class CachedRows:
    """`RowOwner` of the rows `own` of a table of `num_rows`, numbered from the first of them on.

    `weight` [C, D] is the cache: slots, not rows, are what optimizers see; `slot_rows` tells which row is in which.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        dtype: torch.dtype,
        own: range,
        slots: int,
        store: HostStore | FileStore,
        name: str,
    ) -> None:
        """`name`: of the parameter, for messages and files. Raises UserError: the store has no room."""
        self.num_rows = num_rows
        self.own = own
        self.name = name
        slots = min(slots, len(own))
        self.weight = nn.Parameter(torch.zeros(slots, width, dtype=dtype))
        self._store = store
        # Of each: the whole [R, ...], and the part on the device [C, ...].
        self.stored = {WEIGHT: store.allocate(name, (len(own), width), dtype)}
        self._states: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "table rows")
        self._stream: torch.cuda.Stream | None = None
        self._writing: list[Future[None]] = []
        self._hits = self._asked = 0
        self._forget()

    def _forget(self) -> None:
        self._step = 0
        slots = len(self.weight)
        # -1: the slot is free.
        self.slot_rows = torch.full((slots,), -1)
        self._used = torch.zeros(slots, dtype=torch.int64)
        # Slots by their last use, longest ago first, as it was in step `_ordered`; those before `_next` are taken.
        self._order, self._next, self._ordered = torch.arange(slots), 0, self._step
        self._moved = torch.zeros(slots, dtype=torch.bool)
        # Resident rows in ascending order, and the slot of each.
        self._rows = torch.empty(0, dtype=torch.int64)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._fetched: _Fetched | None = None

    @property
    def dense_gradients(self) -> bool:
        return False

    @dense_gradients.setter
    def dense_gradients(self, dense: bool) -> None:
        assert not dense, "settings that move all rows at every step are refused before"

    def draw_rows(self, std: float) -> None:
        """The store's rows are N(0, std), as in a table that is drawn at once."""
        draw_own(self.stored[WEIGHT], self.num_rows, std, self.own)
        self._forget()

    def bind(self, states: Mapping[str, Tensor]) -> None:
        """`states` [C, ...], zero so far, are the optimizer's: they travel with the rows of their slots."""
        self._states = dict(states)
        for name, cached in states.items():
            shape = (len(self.own), *cached.shape[1:])
            self.stored[name] = self._store.allocate(f"{self.name}.{name}", shape, cached.dtype)

    # ------------------------------------------------------------------------------------------- RowOwner (staging.py)

    def prefetch(self, ids: Tensor) -> None:
        # Rows that are resident may be moved until they are asked for; these are not.
        missing = ids.cpu()
        missing = missing[~_found(missing, self._rows)[1]]
        self._fetched = _Fetched(missing, self._thread.submit(self._load, missing))

    def ensure(self, ids: Tensor) -> None:
        """Raises UserError: more rows than the cache has slots."""
        ids = ids.cpu()
        if len(ids) > len(self.weight):
            raise UserError(
                f"train.tables.cache_rows is {len(self.weight):,}, but one step reads {len(ids):,} rows of "
                f"{self.name}: raise it, or lower train.batch_size or data.sequence_length"
            )
        self._raise_errors()
        self._step += 1
        places, found = _found(ids, self._rows)
        missing = ids[~found]
        self._hits, self._asked = len(ids) - len(missing), len(ids)
        self._used[self._slots[places[found]]] = self._step
        if len(missing):
            slots = self._make_room(len(missing))
            self._fill(slots, missing)
        self._fetched = None

    def read(self, ids: Tensor) -> Tensor:
        slots = self._slots_of(ids.cpu())
        assert len(slots) == len(ids), "rows are read that were not made sure of: call ensure(ids) first"
        return self.weight.detach().index_select(0, slots.to(self.weight.device))

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        """The gradient's entries are in the order of rows, not of slots: sums over them are those of a whole table."""
        assert self.weight.grad is None
        slots = self._slots_of(ids.cpu())
        self._moved[slots] = True
        gradient = gradient.to(self.weight.grad_dtype or self.weight.dtype)
        self.weight.grad = torch.sparse_coo_tensor(
            slots[None].to(gradient.device), gradient, self.weight.shape, is_coalesced=True, check_invariants=False
        )

    def updated(self) -> None:
        """Rows are written back when they lose their slots, or at `flush`."""

    def flush(self) -> None:
        slots = self._moved.nonzero().squeeze(1)
        row_bytes = sum(cached[:1].nbytes for cached in self._cached().values())
        # One slice after the other: a copy of the whole cache may not fit beside it.
        for part in slots.split(max(1, FLUSH_BYTES // max(1, row_bytes))):
            self._write_back(part)
            for write in self._writing:
                write.result()
            self._writing.clear()
            self._moved[part] = False

    def measures(self) -> dict[str, float]:
        return {"tables/hit_rate": self._hits / self._asked if self._asked else 1.0}

    def row_ids(self, slots: Tensor) -> Tensor:
        """Numbers of the slots' rows in the whole table."""
        return (self.slot_rows[slots.cpu()] + self.own.start).to(slots.device)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def load(self, name: str, first: int, rows: Tensor) -> None:
        """Take over stored rows from `first` on; the cache starts anew."""
        self.stored[name][first : first + len(rows)] = rows
        self._forget()

    # --------------------------------------------------------------------------------------------------------- inside

    def _cached(self) -> dict[str, Tensor]:
        """The part of each stored tensor that is on the device."""
        return {WEIGHT: self.weight.detach(), **self._states}

    def _slots_of(self, ids: Tensor) -> Tensor:
        """Slots of those of the rows that are resident, in their order."""
        places, found = _found(ids, self._rows)
        return self._slots[places[found]]

    def _make_room(self, count: int) -> Tensor:
        """The `count` slots used longest ago, none of them in this step; what was moved there is written back."""
        slots = self._oldest(count)
        self._write_back(slots[self._moved[slots]])
        self._moved[slots] = False
        rows = self.slot_rows[slots]
        self._drop(rows[rows >= 0].sort().values)
        return slots

    def _oldest(self, count: int) -> Tensor:
        """Slots [count], used longest ago, which count as used in this step from here on.

        Slots are put in order once, and again when that order is used up: what was used since has lost its place.
        """
        found, missing = [], count
        while missing:
            if self._next == len(self._order):
                self._order, self._next, self._ordered = self._used.argsort(stable=True), 0, self._step
            some = self._order[self._next : self._next + missing]
            self._next += len(some)
            some = some[self._used[some] <= self._ordered]
            self._used[some] = self._step
            found.append(some)
            missing -= len(some)
        return torch.cat(found)

    def _fill(self, slots: Tensor, rows: Tensor) -> None:
        """Bring stored rows into free slots."""
        fetched = self._fetched
        places, early = _found(rows, fetched.ids if fetched else rows[:0])
        # The thread writes what was moved before it reads this.
        late = self._thread.submit(self._load, rows[~early]) if not early.all() else None
        if fetched is not None and early.any():
            self._put(slots[early], fetched.values.result(), places[early])
        if late is not None:
            self._put(slots[~early], late.result())
        self.slot_rows[slots] = rows
        self._add(rows, slots)

    def _drop(self, rows: Tensor) -> None:
        """Ascending rows are resident no more."""
        kept = _others(torch.searchsorted(self._rows, rows), len(self._rows))
        self._rows, self._slots = self._rows.index_select(0, kept), self._slots.index_select(0, kept)

    def _add(self, rows: Tensor, slots: Tensor) -> None:
        """Ascending rows are resident, in these slots."""
        places = torch.searchsorted(self._rows, rows) + torch.arange(len(rows))
        around = _others(places, len(self._rows) + len(rows))
        merged = [torch.empty(len(around) + len(places), dtype=torch.int64) for _ in range(2)]
        for each, old, new in zip(merged, (self._rows, self._slots), (rows, slots), strict=True):
            each.index_copy_(0, around, old).index_copy_(0, places, new)
        self._rows, self._slots = merged

    @torch.no_grad()
    def _put(self, slots: Tensor, values: _Values, places: Tensor | None = None) -> None:
        """Rows, those at `places` among them, into slots."""
        if values.arrived is not None:
            torch.cuda.current_stream().wait_event(values.arrived)
        for name, cached in self._cached().items():
            rows = values.rows[name]
            if rows.is_cuda:
                # Made on another stream: its memory must not be used again before this one has read it.
                rows.record_stream(torch.cuda.current_stream())
            if places is not None:
                rows = rows.index_select(0, places.to(rows.device))
            cached.index_copy_(0, slots.to(cached.device), rows)

    def _load(self, rows: Tensor) -> _Values:
        """Stored rows; for a GPU by way of pinned memory, from where they travel while it computes."""
        device = self.weight.device
        found = {}
        for name, stored in self.stored.items():
            shape = (len(rows), *stored.shape[1:])
            found[name] = torch.empty(shape, dtype=stored.dtype, pin_memory=device.type == "cuda")
            torch.index_select(stored, 0, rows, out=found[name])
        if device.type != "cuda":
            return _Values(found, None)
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            found = {name: each.to(device, non_blocking=True) for name, each in found.items()}
        return _Values(found, self._stream.record_event())

    @torch.no_grad()
    def _write_back(self, slots: Tensor) -> None:
        if not len(slots):
            return
        rows = self.slot_rows[slots]
        values = {
            name: each.index_select(0, slots.to(each.device)).to("cpu", non_blocking=True)
            for name, each in self._cached().items()
        }
        arrived = torch.cuda.Event() if self.weight.is_cuda else None
        if arrived is not None:
            arrived.record()
        self._writing = [write for write in self._writing if not write.done() or write.exception()]
        self._writing.append(self._thread.submit(self._save, rows, values, arrived))

    def _save(self, rows: Tensor, values: Mapping[str, Tensor], arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        for name, stored in self.stored.items():
            stored.index_copy_(0, rows, values[name])

    def _raise_errors(self) -> None:
        for write in self._writing:
            if write.done():
                write.result()


def _others(places: Tensor, count: int) -> Tensor:
    """Those of the places 0 to count - 1 that are not among `places`, ascending."""
    others = torch.ones(count, dtype=torch.bool)
    others[places] = False
    return others.nonzero().squeeze(1)


def _found(ids: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `ids` stands in ascending `among`, and whether it does at all."""
    if not len(among):
        return torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    places = torch.searchsorted(among, ids).clamp_(max=len(among) - 1)
    return places, among[places] == ids
