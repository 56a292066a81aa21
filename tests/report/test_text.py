"""Numbers as people read them."""

import pytest

from engram.report.text import counted, duration, short


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1 K"), (26_390_000_000, "26.4 B"), (196_610_000_000, "197 B")]
)
def test_short_numbers(count: int, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0:00:00"), (3725, "1:02:05"), (86_399, "23:59:59"), (90_000, "1 d 1:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_their_nouns() -> None:
    assert [counted(count, "run") for count in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
