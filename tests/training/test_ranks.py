"""Runs on several ranks against the run of one process: losses, checkpoints, and going on with other ranks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import train as train_script
from engram.config import Config, save_config
from engram.config_file import UserError
from engram.data.loader import Batch, Loader
from engram.distributed.world import RankError, World
from engram.model.transformer import Transformer
from engram.training.checkpoint import load_model, open_checkpoint
from engram.training.checkpoint_files import verify
from engram.training.launch import refuse
from engram.training.metrics import read_metrics
from engram.training.ranked import RANK_LOST, agree, lost_rank, train_in_world
from engram.training.tensor_files import TensorFiles
from engram.training.trainer import Trainer
from tests.distributed.ranks import run_ranks, values

MakeConfig = Callable[..., Config]
STEPS = 9
ROOT = Path(train_script.__file__).parent


def settings(stage: int | None, **train: Any) -> dict[str, Any]:
    return {
        "train": {"batch_size": 6, "keep_checkpoints": 9, **train},
        # Where all streams are alike, gradients are nothing but rounding: a small eps would make whole steps of them.
        "optim": {"clip_norm": 0.5, "eps": 1e-3, "muon": {"newton_schulz_dtype": "float32"}},
        "distributed": None if stage is None else {"zero_stage": stage},
    }


def on_ranks(size: int, config: Config, folder: Path) -> None:
    results = folder / f"ranks_{len(list(folder.iterdir()))}"
    results.mkdir()
    assert values(run_ranks(size, train_in_world, config, folder=results)) == size * [0]


def losses(config: Config) -> torch.Tensor:
    """[steps, (loss, norm of the gradient)]"""
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)


def assert_same_course(config: Config, other: Config) -> None:
    """Equal but for the order of sums."""
    ours, theirs = losses(config), losses(other)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=1e-4, atol=0)


def validation_losses(config: Config) -> list[float]:
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return [line["val_loss"] for line in lines if "val_loss" in line]


@pytest.fixture
def alone(make_config: MakeConfig) -> Config:
    """A finished run of one process."""
    config = make_config("alone", **settings(None))
    assert Trainer(config).fit() == 0
    return config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_process_trains(
    make_config: MakeConfig, alone: Config, tmp_path: Path, stage: int
) -> None:
    # Micro-batches of different numbers of targets; evaluations of batches that two ranks do not share equally.
    changes = settings(stage, micro_batch_size=1)
    config = make_config("ranks", **changes, eval={"batch_size": 3})
    on_ranks(2, config, tmp_path)
    assert_same_course(config, alone)
    assert validation_losses(config) == pytest.approx(validation_losses(alone), abs=5e-6)
    ours, theirs = (open_checkpoint(each.run_dir) for each in (config, alone))
    assert ours.state["optimizer"] == theirs.state["optimizer"]
    assert ours.tensors("optim").shapes() == theirs.tensors("optim").shapes()
    # Each has written half of the rows of tables that both hold.
    for kind in ("model", "optim"):
        written = safe_open(ours.folder / f"{kind}-00001-00000.safetensors", "pt").keys()
        rows = ours.tensors(kind).shapes()["blocks.1.memory.embed.weight" + "/first_moment" * (kind == "optim")][0]
        assert sum(f"[{-(-rows // 2)}:{rows}]" in name for name in written if "embed.weight" in name) >= 1
    # Whatever reads a checkpoint reads this one.
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(config.run_dir)(tokens), load_model(alone.run_dir)(tokens), rtol=0, atol=0.01
        )


@pytest.mark.parametrize("stage", [1, 3])
def test_divided_experts_train_and_go_on_undivided(make_config: MakeConfig, tmp_path: Path, stage: int) -> None:
    # With other seeds tokens near a tie change experts within nine steps, in one process and two micro-batches too.
    changes = settings(stage) | {"model": {"moe": {"num_experts": 6}}, "seed": 6}
    alone = make_config("alone", **{**changes, "distributed": None})
    assert Trainer(alone).fit() == 0
    divided = {**changes, "distributed": {"zero_stage": stage, "expert_ranks": 2}}
    on_ranks(2, make_config("divided", **{**divided, "train": {**changes["train"], "stop_after": 6}}), tmp_path)
    config = make_config("divided", **changes)
    on_ranks(2, config, tmp_path)
    assert_same_course(config, alone)
    assert validation_losses(config) == pytest.approx(validation_losses(alone), abs=5e-6)


def test_a_run_goes_on_with_other_ranks_and_stages(make_config: MakeConfig, alone: Config, tmp_path: Path) -> None:
    for ranks, stage, stop in ((2, 2, 3), (3, 3, 6)):
        on_ranks(ranks, make_config("moving", **settings(stage, stop_after=stop)), tmp_path)
    config = make_config("moving", **settings(None))
    assert Trainer(config).fit() == 0
    assert_same_course(config, alone)
    assert "ranks was 3, is 1" in (Path(config.run_dir) / "log.txt").read_text()


def test_the_same_ranks_go_on_to_the_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    # Written beside training or between its steps: the same checkpoints.
    straight = make_config("straight", **settings(1, async_checkpoints=True))
    halted = make_config("halted", **settings(1))
    on_ranks(2, straight, tmp_path)
    on_ranks(2, make_config("halted", **settings(1, stop_after=3)), tmp_path)
    on_ranks(2, halted, tmp_path)
    assert torch.equal(losses(straight), losses(halted))
    for kind in ("model", "optim"):
        ours, theirs = (open_checkpoint(each.run_dir).tensors(kind) for each in (straight, halted))
        assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})


def killed_at_step_5(world: World, config: Config) -> int:
    from engram.training.ranked_engine import RankedEngine

    steps = 0
    apply_gradient = RankedEngine.apply_gradient

    def deadly(engine: RankedEngine, lr: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 5 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        apply_gradient(engine, lr)

    RankedEngine.apply_gradient = deadly  # type: ignore[method-assign]
    return train_in_world(world, config)


def test_a_killed_rank_ends_the_others_and_fewer_go_on(make_config: MakeConfig, alone: Config, tmp_path: Path) -> None:
    config = make_config("killed", **settings(2))
    (folder := tmp_path / "results").mkdir()
    survivor, killed = run_ranks(2, killed_at_step_5, config, folder=folder)
    assert survivor == RANK_LOST
    assert "ended with status -9" in str(killed)
    assert open_checkpoint(config.run_dir).state["step"] == 3
    on_ranks(1, config, tmp_path)
    assert_same_course(config, alone)


def interrupted_at_step_4(world: World, config: Config) -> int:
    """One rank alone is told to stop."""
    from engram.training.ranked_engine import RankedEngine

    steps = 0
    apply_gradient = RankedEngine.apply_gradient

    def told(engine: RankedEngine, lr: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        apply_gradient(engine, lr)

    RankedEngine.apply_gradient = told  # type: ignore[method-assign]
    return train_in_world(world, config)


def test_a_signal_to_one_rank_stops_all_after_saving(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("told", **settings(1))
    assert values(run_ranks(2, interrupted_at_step_4, config, folder=tmp_path)) == [130, 130]
    assert open_checkpoint(config.run_dir).state["step"] == 4


def poisoned_at_step_5(world: World, config: Config) -> int:
    """One rank alone has a loss that is no number."""
    calls, loss = 0, Transformer.loss

    def faulty(model: Transformer, *tensors: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(model, *tensors) * (torch.nan if calls == 5 and world.rank == 1 else 1.0)

    Transformer.loss = faulty  # type: ignore[method-assign]
    return train_in_world(world, config)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_divergence_on_one_rank_ends_all_with_a_post_mortem(
    make_config: MakeConfig, tmp_path: Path, stage: int
) -> None:
    config = make_config("diverged", **settings(stage))
    assert values(run_ranks(2, poisoned_at_step_5, config, folder=tmp_path)) == [3, 3]
    on_ranks(2, healthy := make_config("healthy", **settings(stage, stop_after=4)), tmp_path)
    folder = Path(config.run_dir) / "postmortem_000005"
    verify(folder)
    # Weights and moments are those that step 5 started from; every rank's part of the batch is there.
    for kind in ("model", "optim"):
        ours, expected = TensorFiles(folder, kind), open_checkpoint(healthy.run_dir).tensors(kind)
        assert [name for name in {**ours, **expected} if not torch.equal(ours[name], expected[name])] == []
    assert {path.name for path in folder.glob("batch*")} == {"batch.safetensors", "batch-00001.safetensors"}
    failure = json.loads((folder / "state.json").read_text())["failure"]
    assert {"head.weight", "blocks.1.memory.embed.weight"} <= set(failure["nonfinite_gradients"])


def test_a_skipped_step_leaves_the_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("skipped", **settings(1, skip_nonfinite=1, stop_after=5, checkpoint_every=1))
    assert values(run_ranks(2, poisoned_at_step_5, config, folder=tmp_path)) == [0, 0]
    fourth, fifth = (open_checkpoint(Path(config.run_dir) / f"step_00000{step}") for step in (4, 5))
    assert fifth.state["skipped"] == 1
    for kind in ("model", "optim"):
        before, after = fourth.tensors(kind), fifth.tensors(kind)
        assert [name for name in {**before, **after} if not torch.equal(before[name], after[name])] == []


def damaged_at_step_5(world: World, config: Config) -> int:
    """One rank alone reads a token that the model does not have."""
    batches, take = 0, Loader.__next__

    def damaged(loader: Loader) -> Batch:
        nonlocal batches
        batches += 1
        batch = take(loader)
        if batches == 5 and world.rank == 1:
            batch.tokens[0, 0] = config.model.vocab_size
        return batch

    Loader.__next__ = damaged  # type: ignore[method-assign]
    return train_in_world(world, config)


def test_a_damaged_token_on_one_rank_ends_all(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("damaged", **settings(1))
    first, second = run_ranks(2, damaged_at_step_5, config, folder=tmp_path)
    assert first == RANK_LOST
    assert isinstance(second, UserError) and "a shard holds token 384, but model.vocab_size is 384" in str(second)
    assert open_checkpoint(config.run_dir).state["step"] == 3


@pytest.mark.parametrize(
    ("stage", "train", "complaint"),
    [
        (1, {"batch_size": 5}, "train.batch_size 5 cannot be shared equally by 2 ranks: make it a multiple of 2"),
        (1, {"micro_batch_size": 2}, "train.micro_batch_size 2 does not divide the 3 sequences of one of 2 ranks"),
        (1, {"experts": 2}, "distributed.expert_ranks"),
        (3, {"statistics_every": 2}, "train.statistics_every needs distributed.zero_stage 0, 1 or 2"),
        (3, {"compile": True}, "train.compile needs distributed.zero_stage 0, 1 or 2"),
    ],
)
def test_settings_that_do_not_go_together(
    make_config: MakeConfig, tmp_path: Path, stage: int, train: dict[str, Any], complaint: str
) -> None:
    experts = {"expert_ranks": train.pop("experts")} if "experts" in train else {}
    changes = settings(stage, **train)
    config = make_config("odd", **{**changes, "distributed": {**changes["distributed"], **experts}})
    for error in run_ranks(2, train_in_world, config, folder=tmp_path):
        assert isinstance(error, UserError) and complaint in str(error)
    assert not Path(config.run_dir).exists()


def test_one_rank_needs_no_launcher(make_config: MakeConfig, alone: Config) -> None:
    """In a process of its own: DeepSpeed stays in the process that it was once used in."""
    config = make_config("one", **settings(3))
    save_config(config, path := Path(config.run_dir).with_suffix(".yaml"))
    command = [sys.executable, "train.py", str(path)]
    done = subprocess.run(command, cwd=Path(train_script.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_course(config, alone)


def agree_on(world: World, configs: list[Config]) -> None:
    agree(world, configs[world.rank])


def test_ranks_with_other_settings_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    configs = [make_config("same", **settings(1, steps=steps)) for steps in (9, 8)]
    for error in run_ranks(2, agree_on, configs, folder=tmp_path):
        assert isinstance(error, RankError)
        assert "the config differs: rank 0 has " in str(error) and "give all ranks the same command" in str(error)


def test_ranks_without_a_word_of_them_in_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = Path(train_script.__file__).parent / "configs/quickstart.yaml"
    assert train_script.main([str(path), f"run_dir={tmp_path / 'run'}"]) == 2
    assert "4 ranks were started, but distributed is null: give distributed={}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused_on_all_ranks(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("used", **settings(1))
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "notes.txt").write_text(json.dumps("mine"))
    for error in run_ranks(2, train_in_world, config, folder=tmp_path):
        assert "holds files, but no run" in str(error)


@pytest.mark.parametrize(
    ("reason", "said", "left"),
    [
        (
            "[/src/gloo/pair.cc:537] Read error [127.0.0.1]:7569: Connection reset by peer. This is typically",
            "rank 1 of 3: the connection to another rank broke, which is gone: its own output tells why; the same",
            "(Read error [127.0.0.1]:7569: Connection reset by peer)",
        ),
        (
            "[/src/gloo/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete\nmore",
            "another rank has not answered for 7 s: if it was only slow, raise distributed.timeout_seconds",
            "(Timed out waiting 5000ms for recv operation to complete)",
        ),
    ],
)
def test_what_is_said_of_a_lost_rank(make_config: MakeConfig, reason: str, said: str, left: str) -> None:
    config = make_config("lost", **(settings(1) | {"distributed": {"timeout_seconds": 7}}))
    text = lost_rank(reason, World(1, 3, torch.device("cpu")), config)
    assert said in text and text.endswith(f"goes on from the newest checkpoint, with fewer ranks too {left}")


def latest_of(world: World, config: Config, seen: list[str]) -> int:
    """Each rank sees a `latest` of its own, as on a shared disk that is slow to tell."""
    from engram.training import trainer

    trainer.latest_checkpoint = lambda _: Path(config.run_dir) / seen[world.rank]  # type: ignore[assignment]
    return train_in_world(world, config)


def test_all_go_on_from_what_the_first_rank_sees(make_config: MakeConfig, alone: Config, tmp_path: Path) -> None:
    on_ranks(1, make_config("seen", **settings(1, stop_after=6)), tmp_path)
    config = make_config("seen", **settings(1))
    (folder := tmp_path / "results").mkdir()
    assert values(run_ranks(2, latest_of, config, ["step_000006", "step_000003"], folder=folder)) == [0, 0]
    assert "going on from" in (log := (Path(config.run_dir) / "log.txt").read_text()) and "step_000003" not in log
    assert_same_course(config, alone)


@pytest.mark.parametrize("module", ["deepspeed", "no_such_engine"])
def test_an_exit_after_deepspeed_takes_no_interpreter_down(module: str) -> None:
    program = (
        "import atexit, sys, types\n"
        f"sys.modules[{module!r}] = types.ModuleType({module!r})\n"
        "from engram.training.launch import leave\n"
        "atexit.register(print, 'taken down')\n"
        "print('done', end=' ')\n"
        "leave(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 3
    assert ended.stdout.strip() == ("done" if module == "deepspeed" else "done taken down")


def test_what_all_ranks_find_one_of_each_machine_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", place)
        assert train_script.main(["configs/no_such_file.yaml"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
        assert refuse(RankError("rank 7: full"), RankError.of_another_rank) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
        assert refuse(UserError("full"), UserError.of_another_rank) == 2
        assert capsys.readouterr().err == "error: full\n"
