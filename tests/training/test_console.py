import logging
import warnings
from pathlib import Path

import pytest

from engram.training.console import RunConsole

LINE = {"step": 3, "loss": 2.34567, "lr": 0.00125, "grad_norm": 0.98765, "tokens_per_second": 12_345.6}
SHOWN = "step 3/9  loss 2.3457  val 2.5000  12,346 tokens/s  lr 0.00125  grad norm 0.988  1:01:05 left"


def test_plain_lines_where_stderr_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunConsole(tmp_path / "log.txt", steps=9) as console:
        console.start(0)
        console.advance(2)
        console.report({**LINE, "val_loss": 2.5}, seconds_left=3665)
        # A line without an evaluation repeats no old one.
        console.report({**LINE, "step": 4}, seconds_left=1)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[0] == SHOWN
    assert "val" not in shown.err.splitlines()[1]
    assert [
        line.split(" INFO ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()
    ] == shown.err.splitlines()


def test_a_terminal_gets_a_bar_and_the_log_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with RunConsole(tmp_path / "log.txt", steps=9) as console:
        console.start(0)
        console.report({**LINE, "val_loss": 2.5}, seconds_left=3665)
        logging.getLogger("engram.training").warning("mind [this]")
    error = capsys.readouterr().err
    assert "loss 2.3457  val 2.5000  12,346 tokens/s" in error and "3/9" in error
    assert "grad norm" not in error and "mind [this]" in error
    assert SHOWN in (tmp_path / "log.txt").read_text()


def test_warnings_of_libraries_are_logged(tmp_path: Path) -> None:
    with RunConsole(tmp_path / "log.txt", steps=1):
        warnings.warn("the slow path was taken", stacklevel=1)
    assert "WARNING" in (tmp_path / "log.txt").read_text()
    assert "the slow path was taken" in (tmp_path / "log.txt").read_text()


def test_a_skipped_step_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunConsole(tmp_path / "log.txt", steps=9) as console:
        console.report({**LINE, "loss": float("nan"), "grad_norm": float("inf")}, 0)
    assert "loss nan" in capsys.readouterr().err
