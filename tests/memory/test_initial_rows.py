"""Rows drawn in slices are those that are drawn at once."""

import pytest
import torch

from engram.memory.initial_rows import initial_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3), (37, 5), (64, 16), (80, 7), (1003, 3)])
@pytest.mark.parametrize("keep", [(0, 1.0), (0.3, 0.7), (0.9, 1.0)])
def test_slices_are_parts_of_the_whole(
    num_rows: int, width: int, dtype: torch.dtype, keep: tuple[float, float]
) -> None:
    rows = range(int(keep[0] * num_rows), int(keep[1] * num_rows))
    torch.manual_seed(3)
    whole, after = torch.empty(num_rows, width, dtype=dtype).normal_(std=0.3), torch.rand(5)
    torch.manual_seed(3)
    found, next_row = [], rows.start
    for first, part in initial_rows(num_rows, width, 0.3, dtype, rows, at_once=48):
        assert first == next_row
        next_row += len(part)
        found.append(part)
    # Whatever is drawn afterwards is the same too.
    assert torch.equal(torch.rand(5), after)
    assert next_row == rows.stop or not rows
    assert torch.equal(torch.cat(found) if found else whole[:0], whole[rows.start : rows.stop])
