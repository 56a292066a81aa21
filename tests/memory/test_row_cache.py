"""A cache of rows against the whole table: never a stale row, whatever is read, moved, evicted and fetched ahead."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.config import UserError
from engram.memory import row_cache
from engram.memory.row_cache import CachedRows
from engram.memory.row_store import FileStore, HostStore

ROWS, WIDTH, FIRST = 60, 3, 20


def cached(slots: int, store: Any = None) -> tuple[CachedRows, Tensor]:
    """The last 40 of 60 rows, beside their counts of moves; and what a table of them would hold."""
    own = range(FIRST, ROWS)
    owner = CachedRows(ROWS, WIDTH, dtype=torch.float32, own=own, slots=slots, store=store or HostStore(), name="t")
    owner.bind({"moves": torch.zeros(len(owner.weight), dtype=torch.int32)})
    torch.manual_seed(1)
    owner.draw_rows(1.0)
    torch.manual_seed(1)
    return owner, torch.randn(ROWS, WIDTH)[FIRST:]


def move(owner: CachedRows, ids: Tensor, expected: Tensor, moves: Tensor) -> None:
    """A step of some optimizer: every row by its own gradient, and counted."""
    gradient = torch.arange(len(ids) * WIDTH, dtype=torch.float32).view(-1, WIDTH) + 1
    owner.accumulate(ids, gradient)
    left = owner.weight.grad
    assert left is not None
    slots = left._indices()[0]
    assert torch.equal(owner.row_ids(slots), ids + FIRST)
    with torch.no_grad():
        owner.weight[slots] += left._values()
        owner._states["moves"][slots] += 1
    owner.weight.grad = None
    owner.updated()
    expected[ids] += gradient
    moves[ids] += 1


steps = st.lists(
    st.tuples(st.sets(st.integers(0, ROWS - FIRST - 1), max_size=12), st.booleans(), st.booleans()),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, slots=st.integers(12, 40))
def test_no_row_is_ever_stale(steps: list[tuple[set[int], bool, bool]], slots: int) -> None:
    owner, expected = cached(slots)
    moves = torch.zeros(len(expected), dtype=torch.int32)
    for place, (rows, moved, ahead) in enumerate(steps):
        ids = torch.tensor(sorted(rows), dtype=torch.int64)
        owner.ensure(ids)
        if ahead and place + 1 < len(steps):
            # Of the next step, or of a step that never comes.
            following = steps[place + 1][0] if place % 3 else {row // 2 for row in rows}
            owner.prefetch(torch.tensor(sorted(following), dtype=torch.int64))
        assert torch.equal(owner.read(ids), expected[ids])
        if moved:
            move(owner, ids, expected, moves)
    owner.flush()
    assert torch.equal(owner.stored["weight"], expected)
    assert torch.equal(owner.stored["moves"], moves)


def test_rows_used_longest_ago_make_room() -> None:
    owner, _ = cached(slots=4)
    for wanted in ([0, 1], [2, 3], [0, 2], [4]):
        owner.ensure(torch.tensor(wanted))
    # Row 1 has left, and 3 has not: the oldest first.
    resident = sorted((owner.slot_rows[owner.slot_rows >= 0]).tolist())
    assert resident == [0, 2, 3, 4]
    owner.ensure(torch.tensor([0, 3]))
    assert owner.measures() == {"tables/hit_rate": 1.0}
    owner.ensure(torch.tensor([0, 1, 5]))
    assert owner.measures() == {"tables/hit_rate": pytest.approx(1 / 3)}


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.sets(st.integers(0, ROWS - FIRST - 1), max_size=8), max_size=40), slots=st.integers(8, 20))
def test_who_leaves_was_used_no_later_than_who_stays(steps: list[set[int]], slots: int) -> None:
    owner, _ = cached(slots)
    last_use: dict[int, int] = {}
    for step, rows in enumerate(steps):
        before = set(owner._rows.tolist())
        owner.ensure(torch.tensor(sorted(rows), dtype=torch.int64))
        after = set(owner._rows.tolist())
        # What is there, where it is, and in what order.
        assert owner._rows.tolist() == sorted(after) and owner.slot_rows[owner._slots].tolist() == sorted(after)
        assert after == before - (before - after) | rows and len(after) == min(slots, len(before | rows))
        gone, stayed = before - after, (before & after) - rows
        assert max((last_use[row] for row in gone), default=-1) <= min((last_use[row] for row in stayed), default=step)
        last_use |= dict.fromkeys(rows, step)


def test_a_cache_of_any_size_holds_at_most_all_rows() -> None:
    assert len(cached(slots=1000)[0].weight) == ROWS - FIRST


def test_a_step_larger_than_the_cache() -> None:
    with pytest.raises(UserError, match=r"cache_rows is 12, but one step reads 13 rows of t: raise it"):
        cached(slots=12)[0].ensure(torch.arange(13))


def test_loaded_rows_replace_what_is_cached() -> None:
    owner, expected = cached(slots=12)
    owner.ensure(torch.arange(5))
    owner.load("weight", 3, torch.full((2, WIDTH), 7.0))
    expected[3:5] = 7
    owner.ensure(torch.arange(5))
    assert torch.equal(owner.read(torch.arange(5)), expected[:5])


def test_a_failed_write_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, expected = cached(slots=12)
    owner.ensure(torch.arange(12))
    move(owner, torch.arange(12), expected, torch.zeros(40, dtype=torch.int32))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(owner, "_save", fail)
    with pytest.raises(OSError, match="Input/output error"):
        owner.flush()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_rows_in_files(tmp_path: Path, dtype: torch.dtype) -> None:
    store = FileStore(tmp_path / "deep" / "rows")
    rows = store.allocate("blocks.1/moment", (1000, 3), dtype)
    assert rows.shape == (1000, 3) and rows.dtype == dtype and not rows.any()
    rows[17] = 3
    assert float(rows.sum()) == 9
    # The file has no name: it goes with the process.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.allocate("none", (0, 3), dtype).shape == (0, 3)


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError,
        match=r"cannot hold 12,000 bytes for weight \(No space left on device\): .*, or free space there",
    ):
        FileStore(tmp_path / "deep" / "rows").allocate("weight", (1000, 3), torch.float32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cannot hold 8\.00 GB for weight"):
        FileStore(tmp_path).allocate("weight", (1000, 2_000_000), torch.float32)
    assert tmp_path.is_dir()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("mine")
    with pytest.raises(UserError, match=r"rows cannot hold .*exists\): choose another train\.tables\.folder$"):
        FileStore(tmp_path / "rows").allocate("weight", (1000, 3), torch.float32)


def test_a_flush_takes_no_copy_of_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, expected = cached(40)
    moves = torch.zeros(len(expected), dtype=torch.int32)
    ids = torch.arange(40)
    owner.ensure(ids)
    move(owner, ids, expected, moves)
    # Room for three rows and their counts.
    monkeypatch.setattr(row_cache, "FLUSH_BYTES", 3 * (WIDTH * 4 + 4) + 1)
    sizes = []
    save = CachedRows._save

    def saved(self: CachedRows, rows: Tensor, values: Any, arrived: Any) -> None:
        sizes.append(len(rows))
        save(self, rows, values, arrived)

    monkeypatch.setattr(CachedRows, "_save", saved)
    owner.flush()
    assert sizes == 13 * [3] + [1]
    assert torch.equal(owner.stored["weight"], expected) and torch.equal(owner.stored["moves"], moves)
    # Nothing is left to write.
    owner.flush()
    assert len(sizes) == 14
