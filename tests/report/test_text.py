"""Numbers as people read them."""

import pytest

from engram.report.text import duration, short


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1 K"), (26_390_000_000, "26.4 B"), (196_610_000_000, "197 B")]
)
def test_short_numbers(count: int, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00:00"), (3725, "1:02:05"), (90_000, "25:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
