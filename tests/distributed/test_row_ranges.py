"""Who owns which rows: each row has one owner, and owners share alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.config import ConfigError
from engram.distributed.row_ranges import row_ranges, table_owners


@given(num_rows=st.integers(0, 200), ranks=st.integers(1, 9), data=st.data())
def test_every_row_has_one_owner(num_rows: int, ranks: int, data: st.DataObject) -> None:
    owners = data.draw(st.integers(1, ranks))
    ranges = row_ranges(num_rows, owners, ranks)
    assert len(ranges) == ranks
    assert [row for rows in ranges for row in rows] == list(range(num_rows))
    shares = [len(rows) for rows in ranges]
    assert max(shares[:owners]) - min(shares[:owners]) <= 1
    assert shares[owners:] == [0] * (ranks - owners)
    # Ranks without rows stand at the end of the table: starts ascend.
    assert all(one.stop == other.start for one, other in zip(ranges, ranges[1:], strict=False))


def test_the_first_owners_have_one_row_more() -> None:
    assert row_ranges(11, 3, 5) == [range(4), range(4, 8), range(8, 11), range(11, 11), range(11, 11)]
    assert row_ranges(2, 3, 3) == [range(1), range(1, 2), range(2, 2)]
    assert row_ranges(3 * 2**40 + 1, 2, 2) == [range(3 * 2**39 + 1), range(3 * 2**39 + 1, 3 * 2**40 + 1)]


def test_owners_are_ranks() -> None:
    assert [table_owners("all", 4), table_owners(1, 4), table_owners(4, 4)] == [4, 1, 4]
    with pytest.raises(ConfigError, match=r"table_ranks is 5, but there are 4 ranks: lower it to 4, or to 'all'"):
        table_owners(5, 4)
