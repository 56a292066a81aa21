"""NVIDIA's scoring rule, not lm-eval's."""

import pytest

from eval.ruler.string_match import clean, string_match, string_match_all, string_match_part


def test_all_is_the_share_of_outputs() -> None:
    assert string_match_all("It is 123, and 456.", ("123", "456", "789", "000")) == 0.5
    assert string_match_all("quick-OTTER", ("Quick-Otter",)) == 1
    assert string_match_all("", ("a",)) == 0


def test_one_alias_of_three_is_enough() -> None:
    """lm-eval gives a third."""
    assert string_match_part("in the Netherlands", ("Holland", "the netherlands", "NL!")) == 1
    assert string_match_part("in France", ("Holland", "the Netherlands")) == 0


def test_control_characters_become_line_feeds() -> None:
    assert clean(" \x00a\tb\x1fc\x00 ") == "a\nb\nc"
    assert string_match("a\tb", ("a\nb",), "all") == 1
    with pytest.raises(KeyError):
        string_match("a", ("a",), "some")
