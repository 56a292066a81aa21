"""Training that starts from the weights of another run, with longer sequences and scaled positions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engram.config import Config, ConfigError
from engram.config_identity import run_id
from engram.data.prepare import prepare
from engram.training.checkpoint import load_model, open_checkpoint
from engram.training.checkpoint_files import CheckpointError
from engram.training.files import sha256
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint, metrics_of

MakeConfig = Callable[..., Config]
YARN = {"attention": {"yarn": {"factor": 10, "original_max_position": 32, "mscale": 0.707, "mscale_all_dim": 0.707}}}


@pytest.fixture
def base(make_config: MakeConfig) -> Path:
    """A run of three steps."""
    config = make_config("base", train={"steps": 3})
    assert Trainer(config).fit() is Exit.DONE
    return Path(config.run_dir)


def test_weights_are_taken_over_and_nothing_else(base: Path, make_config: MakeConfig) -> None:
    # A learning rate that changes no weight by a bit: the first checkpoint holds what training started from.
    changes = {"model": YARN, "data": {"sequence_length": 96}, "optim": {"lr": 1e-30, "weight_decay": 0.0}}
    config = make_config("long", train={"steps": 1, "init_from": str(base)}, **changes)
    assert Trainer(config).fit() is Exit.DONE
    before, after = load_model(base).state_dict(), load_model(config.run_dir).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The router's bias has a step size of its own.
    assert all("router" in name and "bias" in name for name in moved), moved
    state = open_checkpoint(config.run_dir).state
    assert state["step"] == 1 and state["tokens"] == 4 * 96

    start = json.loads((Path(config.run_dir) / "code.json").read_text())["starts"][0]
    folder = base / "step_000003"
    digest = sha256(folder / "checksums.json")
    assert start["init_from"] == {"checkpoint": str(folder), "step": 3, "sha256": digest}


def test_the_first_loss_is_the_other_run_s(base: Path, make_config: MakeConfig) -> None:
    """Without a change of positions, training goes on where the weights stood: far below a fresh model's loss."""
    ended = metrics_of(base)[-1]["val_loss"]
    config = make_config("more", train={"steps": 1, "init_from": str(base), "eval_every": 1}, optim={"lr": 1e-30})
    Trainer(config).fit()
    assert metrics_of(config.run_dir)[-1]["val_loss"] == pytest.approx(ended, abs=1e-3)
    assert metrics_of(base)[0]["loss"] > ended + 0.05


def test_a_killed_extension_resumes_and_reads_the_other_run_no_more(base: Path, make_config: MakeConfig) -> None:
    settings = {"steps": 4, "checkpoint_every": 2, "init_from": str(base)}
    whole = make_config("whole", train=settings)
    Trainer(whole).fit()
    stopped = make_config("stopped", train=settings | {"stop_after": 2})
    Trainer(stopped).fit()
    base.rename(base.with_name("gone"))
    Trainer(make_config("stopped", train=settings)).fit()
    starts = json.loads((Path(stopped.run_dir) / "code.json").read_text())["starts"]
    assert ["init_from" in start for start in starts] == [False, True]
    one, other = (Path(each.run_dir) / "step_000004" for each in (whole, stopped))
    assert_same_checkpoint(one, other)


def test_where_weights_come_from_is_part_of_what_a_run_is(make_config: MakeConfig) -> None:
    ids = {run_id(make_config(train=each)) for each in ({}, {"init_from": "a"}, {"init_from": "b"})}
    assert len(ids) == 3


def test_another_model_is_refused(base: Path, make_config: MakeConfig) -> None:
    settings = {"steps": 1, "init_from": str(base)}
    config = make_config("other", train=settings, model={"hidden_size": 48, "memory": {"look_back": "sequence"}})
    with pytest.raises(ConfigError) as error:
        Trainer(config).fit()
    message = str(error.value)
    assert "model.hidden_size: 32 -> 48" in message and 'model.memory.look_back: "segment" -> "sequence"' in message
    assert "only model.attention.rope_theta and model.attention.yarn may differ" in message
    assert not Path(config.run_dir).exists()

    nowhere = make_config("other", train={"steps": 1, "init_from": "runs/none"})
    with pytest.raises(CheckpointError, match=r"runs/none: does not exist"):
        Trainer(nowhere).fit()


def test_another_tokenizer_is_refused(base: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    other = {"data": {"path": str(tmp_path / "elsewhere"), "tokenizer": {"train_characters": 3000}}}
    config = make_config("other", train={"steps": 1, "init_from": str(base)}, **other)
    prepare(config)
    with pytest.raises(ConfigError, match=r"was trained with tokenizer .* prepare the data with data.tokenizer.path="):
        Trainer(config).fit()
    # What the message asks for works.
    name = {"path": str(tmp_path / "same"), "tokenizer": {"path": str(base / "step_000003")}}
    good = make_config("good", train={"steps": 1, "init_from": str(base)}, data=name)
    assert Trainer(good).fit() is Exit.DONE
