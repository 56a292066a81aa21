"""Resume to the bit: a run that was killed, however often, ends as the run that was not."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram.config import Config
from engram.model.transformer import Transformer
from engram.training.checkpoint_files import step_folders
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint, metrics_of, train_in_child

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
KINDS = ["row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam"]


def count_lines(run_dir: str) -> int:
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after_lines(config: Config, lines: int) -> None:
    """Train in a child and kill it as soon as it has logged so many steps."""
    child = train_in_child(config)
    while count_lines(config.run_dir) < lines and child.is_alive():
        time.sleep(0.001)
    child.kill()
    child.join()


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_an_undisturbed_one(make_config: MakeConfig, kind: str) -> None:
    changes = {"optim": {"table": {"kind": kind}}, "train": {"steps": 11, "checkpoint_every": 2, "statistics_every": 4}}
    whole, killed = make_config("whole", **changes), make_config("killed", **changes)
    assert Trainer(whole).fit() is Exit.DONE
    kill_after_lines(killed, lines=random.randint(3, 9))
    assert not (Path(killed.run_dir) / "done.json").exists()
    assert Trainer(killed).fit() is Exit.DONE
    for step in (10, 11):
        assert_same_checkpoint(Path(whole.run_dir) / f"step_{step:06d}", Path(killed.run_dir) / f"step_{step:06d}")
    assert metrics_of(killed.run_dir) == metrics_of(whole.run_dir)
    assert [line["step"] for line in metrics_of(killed.run_dir)] == list(range(1, 12))
    done = [json.loads((Path(config.run_dir) / "done.json").read_text()) for config in (whole, killed)]
    assert done[0] == done[1]


def test_kill_after_kill_at_any_moment(make_config: MakeConfig) -> None:
    """A checkpoint after every step: most kills fall into the writing of one."""
    changes = {"train": {"steps": 12, "checkpoint_every": 1, "skip_nonfinite": 3}}
    whole, killed = make_config("whole", **changes), make_config("killed", **changes)
    assert Trainer(whole).fit() is Exit.DONE
    kills = 0
    while not (Path(killed.run_dir) / "done.json").exists():
        child = train_in_child(killed)
        before = count_lines(killed.run_dir)
        while child.is_alive() and count_lines(killed.run_dir) <= before:
            time.sleep(0.001)
        # From here on, steps take some ten milliseconds.
        child.join(timeout=random.uniform(0, 0.15))
        if kills < 6 and child.is_alive():
            child.kill()
            kills += 1
        child.join()
    assert kills > 1
    assert_same_checkpoint(Path(whole.run_dir) / "latest", Path(killed.run_dir) / "latest")
    assert metrics_of(killed.run_dir) == metrics_of(whole.run_dir)
    assert not list(Path(killed.run_dir).glob(".unfinished*"))


@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_stopping_leaves_the_schedule_as_it_is(make_config: MakeConfig, stop_after: int) -> None:
    changes = {"optim": {"schedule": {"kind": "cosine"}}, "train": {"micro_batch_size": 2}}
    whole = make_config("whole", **changes)
    assert Trainer(whole).fit() is Exit.DONE
    stopped = make_config("stopped", **changes)
    assert Trainer(stopped.replace(train=stopped.train.replace(stop_after=stop_after))).fit() is Exit.DONE
    run_dir = Path(stopped.run_dir)
    assert step_folders(run_dir)[-1].name == f"step_{stop_after:06d}" and not (run_dir / "done.json").exists()
    assert metrics_of(run_dir) == metrics_of(whole.run_dir)[:stop_after]
    assert Trainer(stopped).fit() is Exit.DONE
    assert metrics_of(run_dir) == metrics_of(whole.run_dir)
    # The configs of the two agree by now, run_dir apart.
    assert_same_checkpoint(Path(whole.run_dir) / "latest", run_dir / "latest")


def test_random_numbers_go_on_where_they_stood(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with dropout: a loss that draws from all generators."""
    loss = Transformer.loss

    def noisy(self: Transformer, *args: torch.Tensor) -> torch.Tensor:
        return loss(self, *args) * (0.5 + torch.rand(()) + float(np.random.rand()) + random.random())

    monkeypatch.setattr(Transformer, "loss", noisy)
    whole, parts = make_config("whole"), make_config("parts")
    assert Trainer(whole).fit() is Exit.DONE
    for stop_after in (5, None):
        assert Trainer(parts.replace(train=parts.train.replace(stop_after=stop_after))).fit() is Exit.DONE
    assert_same_checkpoint(Path(whole.run_dir) / "latest", Path(parts.run_dir) / "latest")
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir)


def test_the_best_evaluation_is_remembered(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr("engram.training.engine.validation_loss", lambda *_: next(losses))
    config = make_config(train={"steps": 8, "eval_every": 2})
    for stop_after in (5, None):
        Trainer(config.replace(train=config.train.replace(stop_after=stop_after))).fit()
    done = json.loads((Path(config.run_dir) / "done.json").read_text())
    assert (done["best_val_loss"], done["best_step"], done["val_loss"]) == (2.0, 4, 2.25)


@pytest.mark.parametrize(
    "changes", [{"model": {"memory": None}}, {"model": {"moe": None}}, {"train": {"dtype": "bfloat16"}}]
)
def test_other_models_resume_to_the_bit(make_config: MakeConfig, changes: dict) -> None:
    whole, parts = make_config("whole", **changes), make_config("parts", **changes)
    assert Trainer(whole).fit() is Exit.DONE
    for stop_after in (2, 7, None):
        assert Trainer(parts.replace(train=parts.train.replace(stop_after=stop_after))).fit() is Exit.DONE
    assert_same_checkpoint(Path(whole.run_dir) / "latest", Path(parts.run_dir) / "latest")
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir)


def test_the_command_line_resumes_after_kill_9(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same through `python train.py`, in processes of their own."""
    whole, killed = make_config("whole"), make_config("killed")
    assert Trainer(whole).fit() is Exit.DONE
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "train.py"), str(path)]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while count_lines(killed.run_dir) < 5 and first.poll() is None:
        time.sleep(0.001)
    first.kill()
    first.communicate()
    assert first.returncode == -9
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "going on from" in second.stderr
    assert_same_checkpoint(Path(whole.run_dir) / "latest", Path(killed.run_dir) / "latest")
    assert metrics_of(killed.run_dir) == metrics_of(whole.run_dir)
