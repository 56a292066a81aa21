"""Rows read from the pieces of a table, against the table."""

from itertools import pairwise

import pytest
import torch

from engram.memory.mapped_table import MappedTable
from engram.memory.table import RowTable

ROWS, WIDTH = 23, 3


def placed(*ends: int) -> tuple[MappedTable, RowTable]:
    """Pieces that end before these rows."""
    whole = RowTable(ROWS, WIDTH, init_std=1.0)
    table = MappedTable(ROWS, WIDTH)
    borders = pairwise((0, *ends, ROWS))
    table.place([(first, whole.weight.detach()[first:end]) for first, end in borders])
    return table, whole


@pytest.mark.parametrize("ends", [(), (5,), (1, 2, 22), (5, 5, 11), tuple(range(1, ROWS))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_table(ends: tuple[int, ...], dtype: torch.dtype) -> None:
    table, whole = placed(*ends)
    every = torch.arange(-1, ROWS)[torch.randperm(ROWS + 1)].view(2, 3, 4)
    for ids in (every, every[:, :, :1], torch.full((1, 2, 3), -1), torch.full((1, 2, 3), 4), every[:0]):
        expected = whole(ids, dtype)
        assert table(ids, dtype).dtype == dtype
        assert torch.equal(table(ids, dtype), expected)


def test_pieces_hold_all_rows() -> None:
    with pytest.raises(AssertionError):
        MappedTable(ROWS, WIDTH).place([(0, torch.zeros(ROWS - 1, WIDTH))])
