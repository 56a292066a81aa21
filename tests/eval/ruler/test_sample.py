"""How large a haystack fits."""

from hypothesis import given
from hypothesis import strategies as st

from eval.ruler.sample import largest_fit


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    smallest=st.integers(0, 3),
    room=st.integers(0, 700),
    bounded=st.booleans(),
)
def test_the_largest_fit_is_that_of_a_search_one_by_one(
    steps: list[int], smallest: int, room: int, bounded: bool
) -> None:
    asked: list[int] = []

    def tokens(size: int) -> int:
        asked.append(size)
        return 10 + sum(steps[:size]) + 5 * max(0, size - len(steps))

    least = tokens(smallest)
    limit = least + room
    largest = max(smallest, 25) if bounded else None
    expected = smallest
    while tokens(expected + 1) <= limit and expected != largest:
        expected += 1
    asked.clear()
    assert largest_fit(tokens, smallest, least, limit, largest) == expected
    assert len(asked) <= 40
