"""Which checkpoint has another run's loss, or its compute."""

import json
import shutil
from pathlib import Path

import pytest

from engram.config import UserError, load_config, save_config
from eval.__main__ import main
from eval.matching import match


def write_run(folder: Path, losses: dict[int, float | None], kept: list[int], tokens_per_step: int = 100) -> Path:
    """A run folder with a line of metrics for each step and folders for the kept ones."""
    folder.mkdir()
    lines = [{"step": step, "tokens": step * tokens_per_step, "val_loss": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in kept:
        (folder / f"step_{step:06d}").mkdir()
        save_config(load_config("configs/quickstart.yaml"), folder / f"step_{step:06d}" / "config.yaml")
    return folder


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return write_run(tmp_path / "moe", {10: 5.0, 20: 4.0, 30: 3.5, 40: None, 50: 3.1}, [20, 30, 40])


def test_the_nearest_loss(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {10: 4.5, 20: 3.62, 30: 3.41, 40: 3.0}, [20, 30, 40])
    found = match(run, baseline, "loss")
    assert (found.folder, found.step, found.loss) == (run / "step_000030", 30, 3.41)
    # The baseline's newest checkpoint with a loss: neither a later line nor a checkpoint that was not measured.
    assert (found.other, found.other_step, found.other_loss) == (baseline / "step_000030", 30, 3.5)
    # A checkpoint that is gone is no match, however near it was.
    shutil.rmtree(run / "step_000030")
    assert match(run, baseline, "loss").step == 20


def test_of_two_equally_near_ones_the_earlier(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {10: 3.25, 20: 3.75, 30: 3.75}, [10, 20, 30])
    assert match(run, baseline, "loss").step == 10


def test_equal_compute(tmp_path: Path, baseline: Path) -> None:
    # Twice the tokens in each step.
    run = write_run(tmp_path / "run", {10: 4.0, 20: None, 30: 3.0}, [10, 20, 30], tokens_per_step=200)
    found = match(run, baseline, "flops")
    assert (found.step, found.tokens, found.loss, found.other_step) == (20, 4000, None, 40)
    assert "loss not measured" in str(found)
    assert found.flops == found.other_flops and "FLOPs" in str(found)
    shutil.rmtree(run / "step_000020")
    with pytest.raises(UserError, match=r"no checkpoint has taken \d\.\d+e\+\d+ FLOPs, within 10%, .*\(here: .*, .*\)"):
        match(run, baseline, "flops")


def test_nothing_to_match(tmp_path: Path, baseline: Path) -> None:
    unmeasured = write_run(tmp_path / "unmeasured", {10: None}, [10])
    with pytest.raises(UserError, match="no checkpoint stands where the validation loss was measured"):
        match(unmeasured, baseline, "loss")
    with pytest.raises(UserError, match=r"unmeasured: no checkpoint stands where the validation loss was measured"):
        match(baseline, unmeasured, "loss")
    with pytest.raises(UserError, match=r"step_000040: has no metrics.jsonl with a step in it: give a run folder"):
        match(baseline / "step_000040", baseline, "loss")


def test_the_command(tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {10: 3.6}, [10])
    assert main(["match", "--checkpoint", str(run), "--baseline", str(baseline)]) == 0
    assert capsys.readouterr().out == (
        f"{run}/step_000010 (step 10, 1,000 tokens, loss 3.6000) against {baseline}/step_000030 (step 30, 3,000 "
        "tokens, loss 3.5000)\n"
    )
    assert main(["match", "--checkpoint", str(tmp_path), "--baseline", str(baseline)]) == 2
