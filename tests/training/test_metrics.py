import json
import math
from pathlib import Path

import pytest

from engram.config import UserError
from engram.training.metrics import MetricsFile, cut_after, read_metrics


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_on_disk_at_once_and_non_finite_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.write({"step": 1, "loss": 2.5})
        assert lines(path) == [{"step": 1, "loss": 2.5}]
        metrics.write({"step": 2, "loss": math.nan, "grad_norm": math.inf})
    assert lines(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "grad_norm": None}]


@pytest.mark.parametrize(("resume_step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (7, [1, 2, 3])])
def test_resuming_cuts_what_lies_past_the_checkpoint(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    # The last line was cut off by a kill.
    path.write_text("".join(f'{{"step": {step}, "loss": 0.1}}\n' for step in (1, 2, 3)) + '{"step": 4, "lo')
    with MetricsFile(path, resume_step) as metrics:
        metrics.write({"step": resume_step + 1})
    assert [line["step"] for line in lines(path)] == [*kept, resume_step + 1]


def test_numbers_survive_the_cut_to_the_last_digit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    value = 0.1 + 0.2
    path.write_text(json.dumps({"step": 1, "loss": value}) + '\n{"step": 2}\n')
    cut_after(path, 1)
    assert read_metrics(path) == [{"step": 1, "loss": value}]


def test_a_file_without_later_lines_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    cut_after(path, 1)
    assert path.stat().st_ino == before
    cut_after(tmp_path / "absent.jsonl", 1)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 .*remove that line"):
        read_metrics(path)
