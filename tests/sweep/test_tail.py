"""Ends of files that are still being written, whole or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from engram.sweep.tail import last_lines, last_metrics, number, read_object

LINE = {"step": 4, "loss": 2.5}


def metrics(folder: Path, *lines: str) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines))
    return last_metrics(path)


def test_a_line_without_its_end_is_still_being_written(tmp_path: Path) -> None:
    assert metrics(tmp_path, '{"step": 1}', json.dumps(LINE), '{"step": 5, "lo') == LINE
    # Complete as JSON, but its line feed has not come yet.
    assert metrics(tmp_path, json.dumps(LINE), '{"step": 5}') == LINE
    assert metrics(tmp_path, '{"step": 5}') == {}


@pytest.mark.parametrize("text", ["", "\n", "{\n", "[1]\n", '"x"\n', "\x00\x00\n", "{}\n"])
def test_damaged_metrics_say_nothing(tmp_path: Path, text: str) -> None:
    assert metrics(tmp_path, text) == {}


def test_a_damaged_line_hides_none_before_it(tmp_path: Path) -> None:
    assert metrics(tmp_path, json.dumps(LINE), "\x00", "") == LINE


def test_no_file(tmp_path: Path) -> None:
    assert last_metrics(tmp_path / "none") == read_object(tmp_path / "none") == {}
    assert last_lines(tmp_path / "none", 3) == ""


@pytest.mark.parametrize("length", [10, 16_000, 16_384, 20_000, 400_000])
def test_lines_of_any_length_are_found(tmp_path: Path, length: int) -> None:
    """Statistics of many layers make lines longer than what is read at first."""
    long = json.dumps({"step": 7, "note": "x" * length})
    assert metrics(tmp_path, json.dumps(LINE), long, "")["step"] == 7
    assert metrics(tmp_path, json.dumps(LINE), long, long[:-5])["step"] == 7


def test_the_last_evaluation_is_kept_until_the_next(tmp_path: Path) -> None:
    lines = [{"step": 1, "val_loss": 3.5}, {"step": 2, "val_loss": 3.0}, {"step": 3, "val_loss": None}, LINE]
    assert metrics(tmp_path, *map(json.dumps, lines), "") == {**LINE, "val_loss": 3.0}


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("first\n\nsecond\n  \nthird\nunfini\xe9")
    assert last_lines(path, 2) == "third\nunfini\xe9"
    assert last_lines(path, 9) == "first\nsecond\nthird\nunfini\xe9"
    # An earlier attempt's words are not this one's.
    assert last_lines(path, 9, start=len("first\n\nsecond\n")) == "third\nunfini\xe9"
    assert last_lines(path, 1, start=path.stat().st_size) == ""


def test_numbers() -> None:
    assert (number(1), number(0.5), number(float("nan")), number(float("inf")), number("1"), number(None)) == (
        *(1, 0.5),
        *(None,) * 4,
    )
