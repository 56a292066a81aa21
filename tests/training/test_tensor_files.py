"""Tensors come back whole from any division into files."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engram.training.tensor_files import TensorFiles, TensorFilesError, rows_key

ROWS = 23


@pytest.fixture
def table() -> Tensor:
    return torch.randn(ROWS, 3)


def write(folder: Path, table: Tensor, borders: list[int], files: int = 3) -> None:
    """The table in pieces between `borders`, spread over files in no order, beside two whole tensors."""
    folder.mkdir(exist_ok=True)
    pieces: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for number, (first, stop) in enumerate(itertools.pairwise(borders)):
        pieces[number * 2 % files][rows_key("a.table", first, stop)] = table[first:stop].clone()
    pieces[0] |= {"whole": torch.arange(4.0), "number": torch.tensor(7.0)}
    for number, tensors in enumerate(pieces):
        save_file(tensors, folder / ("model.safetensors" if number == 0 else f"model-{number:05d}.safetensors"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    borders=st.lists(st.integers(1, ROWS - 1), unique=True, max_size=6),
    part=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted),
    at_once=st.integers(1, ROWS),
)
def test_any_pieces_give_any_rows(
    tmp_path_factory: pytest.TempPathFactory, table: Tensor, borders: list[int], part: list[int], at_once: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, table, [0, *sorted(borders), ROWS])
    files = TensorFiles(folder, "model")
    assert files.shapes() == {"a.table": (ROWS, 3), "whole": (4,), "number": ()}
    found = dict(files)
    assert torch.equal(found["a.table"], table)
    assert torch.equal(found["whole"], torch.arange(4.0)) and found["number"] == 7
    first, stop = part
    parts = list(files.rows("a.table", first, stop, at_once))
    assert all(len(rows) <= at_once for _, rows in parts)
    assert [row for start, rows in parts for row in range(start, start + len(rows))] == list(range(first, stop))
    assert torch.equal(torch.cat([table[:0], *(rows for _, rows in parts)]), table[first:stop])


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([(0, 9), (12, ROWS)], r"model-00001\.safetensors: of a\.table, rows 9 to 11 are in no file"),
        ([(5, ROWS)], "rows 0 to 4 are in no file"),
        ([(0, 9), (8, ROWS)], "row 8 is in two files"),
    ],
)
def test_missing_and_doubled_rows_are_named(
    tmp_path: Path, table: Tensor, pieces: list[tuple[int, int]], complaint: str
) -> None:
    names = ["model.safetensors", "model-00001.safetensors"]
    for name, (first, stop) in zip(names, pieces, strict=False):
        save_file({rows_key("a.table", first, stop): table[first:stop].clone()}, tmp_path / name)
    with pytest.raises(TensorFilesError, match=complaint):
        TensorFiles(tmp_path, "model")


def test_a_name_that_lies_about_its_rows(tmp_path: Path, table: Tensor) -> None:
    save_file({rows_key("a.table", 0, 9): table}, tmp_path / "model.safetensors")
    with pytest.raises(TensorFilesError, match=r"a\.table\[0:9\] holds 23 rows"):
        TensorFiles(tmp_path, "model")


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(TensorFilesError, match=r"model\.safetensors: cannot be read"):
        TensorFiles(tmp_path, "model")
