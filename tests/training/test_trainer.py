"""How runs end, and what they leave behind."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engram.config import Config
from engram.data.loader import Loader, validation_batches
from engram.data.shards import Dataset
from engram.model.evaluation import validation_loss
from engram.model.transformer import Transformer
from engram.training import checkpoint_files, saver
from engram.training.checkpoint import load_model
from engram.training.checkpoint_files import save_step, step_folders
from engram.training.run_folder import RunFolderError
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint, metrics_of, tensors_of, train_in_child

MakeConfig = Callable[..., Config]


def names(run_dir: str) -> set[str]:
    return {path.name for path in Path(run_dir).iterdir()}


def test_a_finished_run(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config()
    assert Trainer(config).fit() is Exit.DONE
    run_dir = Path(config.run_dir)
    files = {"config.yaml", "code.json", "parameters.txt", "metrics.jsonl", "log.txt", "latest", "done.json", "lock"}
    # The last two of the checkpoints after steps 3, 6 and 9.
    assert names(config.run_dir) == files | {"step_000006", "step_000009"}
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 10)]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 9]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["val_loss"] < lines[3]["val_loss"]
    # Warm-up over two steps, then the paper's steps at 80 % and 90 % (none of 9 reaches it).
    assert [line["lr"] for line in lines] == pytest.approx([0.0015, *[0.003] * 7, 0.003 * 0.316])
    done = json.loads((run_dir / "done.json").read_text())
    assert done == {
        "step": 9,
        "tokens": 1152,
        "loss": lines[-1]["loss"],
        "val_loss": lines[-1]["val_loss"],
        "best_val_loss": lines[-1]["val_loss"],
        "best_step": 9,
        "skipped_steps": 0,
    }
    assert "memory.embed.weight" in (run_dir / "parameters.txt").read_text()
    code = json.loads((run_dir / "code.json").read_text())["starts"][0]
    assert code["threads"] == 1 and code["device"] == "cpu"
    manifest = json.loads((Path(config.data.path) / "manifest.json").read_text())
    assert code["data_digest"] == manifest["splits"]["train"]["digest"]
    assert code["tokenizer_digest"] == manifest["tokenizer"]["digest"]
    assert f"step 4/9  loss {lines[3]['loss']:.4f}  val {lines[3]['val_loss']:.4f}" in (run_dir / "log.txt").read_text()
    # The reported loss is that of the saved model.
    model = load_model(run_dir)
    assert model.head.weight.dtype == torch.float32
    before = (run_dir / "log.txt").read_text()
    assert Trainer(config).fit() is Exit.DONE
    after = (run_dir / "log.txt").read_text()[len(before) :]
    assert "is finished after step 9: nothing to do (another run needs another run_dir)" in after
    with pytest.raises(RunFolderError, match="train.steps: 9 -> 12"):
        Trainer(make_config(train={"steps": 12})).fit()


def test_a_folder_that_vanishes_before_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()

    def save(folder: Path, step: int, *arguments: Any) -> None:
        if step == config.train.steps:
            shutil.rmtree(folder)
            folder.mkdir()
        save_step(folder, step, *arguments)

    monkeypatch.setattr(saver, "save_step", save)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: does not hold step 9.* train the run anew"):
        Trainer(config).fit()
    assert not (Path(config.run_dir) / "done.json").exists()


def test_lines_appear_as_often_as_asked(make_config: MakeConfig) -> None:
    config = make_config(train={"log_every": 5, "eval_every": 7, "steps": 12, "checkpoint_every": 100})
    assert Trainer(config).fit() is Exit.DONE
    assert [line["step"] for line in metrics_of(config.run_dir)] == [1, 5, 7, 10, 12]
    assert [path.name for path in step_folders(Path(config.run_dir))] == ["step_000012"]


def test_the_reported_validation_loss_is_that_of_the_saved_weights(make_config: MakeConfig) -> None:
    config = make_config(train={"steps": 2})
    Trainer(config).fit()
    dataset = Dataset(config.data.path, "validation")
    # Another batch size, the same windows.
    batches = validation_batches(dataset, config.data.sequence_length, 3, config.eval.tokens)
    found = validation_loss(load_model(config.run_dir), batches, torch.device("cpu"))
    assert found == pytest.approx(metrics_of(config.run_dir)[-1]["val_loss"], rel=1e-6)


# --------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_130(make_config: MakeConfig, number: signal.Signals) -> None:
    changes = {"train": {"steps": 200, "checkpoint_every": 1000, "eval_every": 1000}}
    config = make_config("interrupted", **changes)
    child = train_in_child(config)
    while not (Path(config.run_dir) / "metrics.jsonl").exists() or not metrics_of(config.run_dir):
        time.sleep(0.001)
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 130
    step = metrics_of(config.run_dir)[-1]["step"]
    assert step < 200 and names(config.run_dir) >= {"latest", f"step_{step:06d}"}
    log = (Path(config.run_dir) / "log.txt").read_text()
    assert f"{number.name}: finishing this step" in log and f"interrupted after step {step}" in log
    # It goes on, and ends where an undisturbed run of that length does.
    longer = config.replace(train=config.train.replace(stop_after=step + 3))
    assert Trainer(longer).fit() is Exit.DONE
    whole = make_config("whole", **changes)
    assert Trainer(whole.replace(train=whole.train.replace(stop_after=step + 3))).fit() is Exit.DONE
    assert_same_checkpoint(Path(config.run_dir) / "latest", Path(whole.run_dir) / "latest")


def test_signal_handlers_are_put_back(make_config: MakeConfig) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Trainer(make_config(train={"steps": 1})).fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----------------------------------------------------------------------------------------------------------- divergence


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """poisoned({5}): the loss of the fifth step is NaN, and so are all gradients behind it."""

    def poison(steps: set[int]) -> None:
        calls, loss = [0], Transformer.loss

        def faulty(self: Transformer, *args: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return loss(self, *args) * (torch.nan if calls[0] in steps else 1.0)

        monkeypatch.setattr(Transformer, "loss", faulty)

    return poison


def test_divergence_ends_with_3_and_a_post_mortem(make_config: MakeConfig, poisoned: Callable) -> None:
    healthy = make_config("healthy", train={"stop_after": 4})
    Trainer(healthy).fit()
    poisoned({5})
    config = make_config("diverged")
    assert Trainer(config).fit() is Exit.DIVERGED
    run_dir = Path(config.run_dir)
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 4]
    assert names(config.run_dir) & {"done.json"} == set() and (run_dir / "latest").readlink() == Path("step_000003")
    folder = run_dir / "postmortem_000005"
    checkpoint_files.verify(folder)
    # Weights and moments are those that step 5 started from.
    expected = tensors_of(Path(healthy.run_dir) / "step_000004")
    assert [name for name, tensor in tensors_of(folder).items() if not torch.equal(tensor, expected[name])] == []
    failure = json.loads((folder / "state.json").read_text())["failure"]
    assert (failure["step"], failure["loss"], failure["grad_norm"]) == (5, "nan", "nan")
    assert {"head.weight", "blocks.1.memory.embed.weight"} <= set(failure["nonfinite_gradients"])
    # The batch is the fifth.

    loader = Loader(Dataset(config.data.path, "train"), 32, 4, config.data.shuffle_seed, prefetch=0)
    fifth = [next(loader) for _ in range(5)][-1]
    saved = load_file(folder / "batch.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in fifth._asdict().items())
    assert "step 5: loss nan, gradient norm nan: diverged" in (run_dir / "log.txt").read_text()


def test_skipped_steps_leave_the_weights_and_are_counted(make_config: MakeConfig, poisoned: Callable) -> None:
    poisoned({2, 3})
    config = make_config(train={"skip_nonfinite": 2, "stop_after": 3, "checkpoint_every": 1, "keep_checkpoints": 9})
    assert Trainer(config).fit() is Exit.DONE
    run_dir = Path(config.run_dir)
    first = tensors_of(run_dir / "step_000001")
    for step in (2, 3):
        later = tensors_of(run_dir / f"step_{step:06d}")
        assert [name for name in first if not torch.equal(first[name], later[name])] == []
    assert [line["loss"] is None for line in metrics_of(run_dir)] == [False, True, True]
    assert "step 3: loss nan, gradient norm nan: skipped, 2 of 2" in (run_dir / "log.txt").read_text()
    # The count survives a restart: the next one is one too many. Calls 4 and 5 are steps 4 and 5.
    poisoned({2})
    assert Trainer(config.replace(train=config.train.replace(stop_after=None))).fit() is Exit.DIVERGED
    assert (run_dir / "postmortem_000005").is_dir()


def test_a_changed_environment_is_told(make_config: MakeConfig) -> None:
    config = make_config(train={"stop_after": 1})
    Trainer(config).fit()
    torch.set_num_threads(1)
    Trainer(make_config(train={"threads": 2, "stop_after": 2})).fit()
    log = (Path(config.run_dir) / "log.txt").read_text()
    assert "train.threads: 1 -> 2: from here on the run is not to the bit" in log
    assert "resuming is exact to the bit only where nothing changed; here: threads was 1, is 2" in log


def test_logging_is_as_before_afterwards(make_config: MakeConfig) -> None:
    logger = logging.getLogger("engram")
    before = logger.level, list(logger.handlers)
    Trainer(make_config(train={"steps": 1})).fit()
    assert (logger.level, list(logger.handlers)) == before


def test_the_terminal_gets_the_run_in_short_and_what_comes_next(
    make_config: MakeConfig, capsys: pytest.CaptureFixture
) -> None:
    config = make_config(train={"steps": 2})
    Trainer(config).fit()
    error = capsys.readouterr().err
    assert f"{config.run_dir}: cpu, float32, 53,847 parameters (3,472 in n-gram tables), 2 steps x 128 tokens" in error
    assert f"validation loss {metrics_of(config.run_dir)[-1]['val_loss']:.4f}\n" in error
    assert f"python -m eval report {config.run_dir}" in error
    assert "embed.weight" not in error and "embed.weight" in (Path(config.run_dir) / "log.txt").read_text()


def test_a_finished_run_that_is_of_no_use_says_so(
    make_config: MakeConfig, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram.training.engine.validation_loss", lambda *_: float("nan"))
    config = make_config(train={"steps": 1})
    assert Trainer(config).fit() is Exit.DONE
    assert "the validation loss is not finite: the model is of no use" in capsys.readouterr().err
