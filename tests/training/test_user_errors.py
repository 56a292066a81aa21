"""Mistakes and full disks from end to end: one message, and a run that can go on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.config import Config, UserError
from engram.data.manifest import file_digest
from engram.training import checkpoint_files, engine, metrics, setup
from engram.training.checkpoint import CheckpointError
from engram.training.run_folder import RunFolderError
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint

MakeConfig = Callable[..., Config]


def test_a_full_disk_while_saving(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, write = make_config(), checkpoint_files.save_file

    def full(tensors: dict, path: Path) -> None:
        if "step_000006" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", full)
        with pytest.raises(CheckpointError, match="step_000006: cannot be written .*step_000003 is whole"):
            Trainer(config).fit()
    assert not list(Path(config.run_dir).glob(".unfinished*"))
    assert Trainer(config).fit() is Exit.DONE
    whole = make_config("whole")
    Trainer(whole).fit()
    assert_same_checkpoint(Path(config.run_dir) / "latest", Path(whole.run_dir) / "latest")


def test_a_full_disk_while_logging(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.MetricsFile, "write", full)
    with pytest.raises(RunFolderError, match="the disk is full: free space"):
        Trainer(make_config()).fit()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_shard_with_tokens_beyond_the_vocabulary(
    make_config: MakeConfig, data: Path, tmp_path: Path, split: str
) -> None:
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    path = damaged / f"{split}_000.bin"
    tokens = np.memmap(path, np.uint16, "r+")
    tokens[5:] = 384
    tokens.flush()
    config = make_config(data={"path": str(damaged)})
    with pytest.raises(UserError, match="its sha256 is .*, but the manifest says"):
        Trainer(config).fit()
    # Prepared so, as far as the checksums tell.
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = file_digest(path)
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="token 5 is 384, but ids end at 383"):
        Trainer(config).fit()
    # Neither start leaves anything behind.
    assert not Path(config.run_dir).exists()


def test_tokens_beyond_the_vocabulary_that_appear_while_training(
    make_config: MakeConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    np.full(10_000, 384, np.uint16).tofile(damaged / "swapped")
    os.truncate(damaged / "swapped", (damaged / "validation_000.bin").stat().st_size)
    os.replace(damaged / "swapped", damaged / "validation_000.bin")
    monkeypatch.setattr(setup, "verify_folder", lambda folder: None)
    with pytest.raises(UserError, match="holds token 384, but model.vocab_size is 384"):
        Trainer(make_config(data={"path": str(damaged)})).fit()


def test_data_of_another_vocabulary(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="model.vocab_size was 384, is 400"):
        Trainer(make_config(model={"vocab_size": 400})).fit()


def test_sequences_longer_than_the_data(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length 100,000"):
        Trainer(make_config(data={"sequence_length": 100_000})).fit()


def test_resuming_on_other_data_is_refused(make_config: MakeConfig, data: Path, tmp_path: Path) -> None:
    config = make_config(train={"stop_after": 2})
    Trainer(config).fit()
    # The same settings, another content: as if the sources had changed and the folder had been prepared again.
    other = Path(shutil.copytree(data, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["splits"]["train"]["digest"] = "f" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="data_digest was .* has ffffffffffff.*: point data.path"):
        Trainer(make_config(data={"path": str(other)})).fit()
    # A copy elsewhere is the same data.
    moved = shutil.copytree(data, tmp_path / "moved")
    assert Trainer(make_config(data={"path": str(moved)}, train={"stop_after": 3})).fit() is Exit.DONE


def test_resuming_with_another_tokenizer_is_refused(make_config: MakeConfig, data: Path, tmp_path: Path) -> None:
    config = make_config(train={"stop_after": 2})
    Trainer(config).fit()
    other = Path(shutil.copytree(data, tmp_path / "other"))
    # An unknown field at the end of the model: it loads as before, with another digest.
    with (other / "tokenizer.model").open("ab") as file:
        file.write(b"\xa2\x06\x01x")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["digest"] = file_digest(other / "tokenizer.model")
    manifest["files"]["tokenizer.model"]["bytes"] += 4
    manifest["files"]["tokenizer.model"]["sha256"] = manifest["tokenizer"]["digest"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="tokenizer_digest was"):
        Trainer(make_config(data={"path": str(other)})).fit()


def test_unprepared_data_is_prepared(make_config: MakeConfig, data: Path, tmp_path: Path) -> None:
    config = make_config(train={"steps": 1}, data={"path": str(tmp_path / "new" / "tiny")})
    assert Trainer(config).fit() is Exit.DONE
    log = (Path(config.run_dir) / "log.txt").read_text()
    assert f"{config.data.path} does not exist yet: preparing it" in log
    tokens = [(Path(path) / "train_000.bin").read_bytes() for path in (config.data.path, data)]
    assert tokens[0] == tokens[1]


def test_cuda_where_there_is_none(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.device is cuda, but torch sees no CUDA device"):
        Trainer(make_config(train={"device": "cuda"})).fit()


def test_a_validation_split_of_less_than_a_sequence_is_told_before_training(make_config: MakeConfig) -> None:
    config = make_config(data={"sequence_length": 1000})
    with pytest.raises(UserError, match="the validation split has"):
        Trainer(config).fit()
    assert not (Path(config.run_dir) / "metrics.jsonl").exists()
    # Nothing has begun: the same folder takes the corrected config.
    assert Trainer(make_config(train={"steps": 1})).fit() is Exit.DONE


def test_fewer_evaluation_tokens_than_a_sequence(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="eval.tokens is 31, less than one sequence"):
        Trainer(make_config(eval={"tokens": 31})).fit()


@pytest.mark.parametrize("change", [{"hidden_size": 100_000_000}, {"memory": {"rows_per_head": 10**12}}])
def test_a_model_beyond_the_memory(make_config: MakeConfig, change: dict) -> None:
    config = make_config(model=change)
    with pytest.raises(
        UserError, match=r"needs [\d,.]+ GiB .* only [\d,.]+ GiB are free on cpu: lower model.hidden_size"
    ):
        Trainer(config).fit()
    assert not Path(config.run_dir).exists()


def test_a_step_that_cannot_fit(make_config: MakeConfig) -> None:
    """Said at the start: where memory is promised freely, the process would be killed without a word."""
    config = make_config(train={"batch_size": 10**9})
    with pytest.raises(UserError, match=r"for a training step, but only .* lower train\.micro_batch_size \(now 10+ of"):
        Trainer(config).fit()
    assert not Path(config.run_dir).exists()


def test_more_threads_than_make_sense(make_config: MakeConfig) -> None:
    cpus = os.cpu_count()
    config = make_config(train={"threads": 100_000})
    with pytest.raises(UserError, match=f"train.threads is 100000, but this machine has {cpus} CPUs: lower it to"):
        Trainer(config).fit()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("compiler", "reason"), [("/bin/false", "CXX names '/bin/false'"), ("c++ '", "CXX names")])
def test_without_a_compiler_steps_are_eager(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("CXX", compiler)
    config = make_config(train={"steps": 1, "compile": True})
    with inductor.patch({"cpp.cxx": (None, compiler)}):
        assert Trainer(config).fit() is Exit.DONE
    log = (Path(config.run_dir) / "log.txt").read_text()
    assert f"train.compile has no effect, and steps are slower: {reason}" in log


def test_an_allocator_that_gives_up(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(setup, "build_model", refuse)
    with pytest.raises(UserError, match="ran out of memory: lower model.hidden_size"):
        Trainer(make_config()).fit()


def exhaust(*_: object) -> None:
    torch.zeros(2**50, dtype=torch.uint8)


def test_a_step_beyond_the_memory(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run says what to lower, and goes on from its last checkpoint as if nothing had happened."""
    config, compute = make_config(train={"micro_batch_size": 2}), engine.compute_gradient
    steps = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "compute_gradient", lambda *given: (exhaust if next(steps) == 5 else compute)(*given))
        with pytest.raises(UserError) as raised:
            Trainer(config).fit()
    assert str(raised.value) == (
        "the cpu ran out of memory in a training step over 2 x 32 tokens: lower train.micro_batch_size (now 2 of "
        "train.batch_size 4) or set train.activation_checkpointing=true, and the same command goes on from the last "
        "checkpoint; else lower train.batch_size or data.sequence_length or the size of the model in another run_dir"
    )
    assert str(raised.value) in (Path(config.run_dir) / "log.txt").read_text()
    assert os.readlink(Path(config.run_dir) / "latest") == "step_000003"
    assert Trainer(config).fit() is Exit.DONE
    whole = make_config("whole", train={"micro_batch_size": 2})
    Trainer(whole).fit()
    assert_same_checkpoint(Path(config.run_dir) / "latest", Path(whole.run_dir) / "latest")


def test_the_remedies_are_those_that_are_left(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compute_gradient", exhaust)
    with pytest.raises(UserError, match=r"2 x 32 tokens: lower train\.micro_batch_size \(now 2 .* 4\), and"):
        Trainer(make_config(train={"micro_batch_size": 2, "activation_checkpointing": True})).fit()
    with pytest.raises(UserError, match=r"1 x 32 tokens: lower data\.sequence_length or the size"):
        Trainer(make_config("one", train={"micro_batch_size": 1, "activation_checkpointing": True})).fit()


def test_an_evaluation_beyond_the_memory(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "validation_loss", exhaust)
    with pytest.raises(UserError, match=r"in an evaluation over 4 x 32 tokens: lower eval\.batch_size, and the"):
        Trainer(make_config()).fit()


def test_a_log_that_is_a_folder(make_config: MakeConfig) -> None:
    config = make_config()
    (Path(config.run_dir) / "log.txt").mkdir(parents=True)
    (Path(config.run_dir) / "lock").touch()
    with pytest.raises(RunFolderError, match=r"log\.txt: Is a directory"):
        Trainer(config).fit()


def test_a_disk_full_of_everything(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """log.txt on /dev/full: whatever is flushed to it fails, closing it included."""
    config = make_config(train={"steps": 1})
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "lock").touch()
    (Path(config.run_dir) / "log.txt").symlink_to("/dev/full")
    (Path(config.run_dir) / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(metrics, "cut_after", lambda path, step: None)
    with pytest.raises(RunFolderError, match="the disk is full: free space"):
        Trainer(config).fit()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("done.json", "{", r"done\.json: is damaged: delete it"),
        ("done.json", "[]", r"done\.json: is damaged: delete it"),
        ("code.json", "{}", r"code\.json: is damaged: delete it"),
        ("code.json", '{"starts": [1]}', r"code\.json: is damaged: delete it"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl: line 1 is no object with a step"),
        ("latest/checksums.json", "[]", r"checksums\.json: is damaged: "),
        ("latest/checksums.json", "{}", r"checksums\.json: is damaged: "),
    ],
)
def test_damaged_files_of_a_run(make_config: MakeConfig, name: str, content: str, message: str) -> None:
    config = make_config(train={"stop_after": 1})
    Trainer(config).fit()
    (Path(config.run_dir) / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Trainer(config).fit()
    assert message.split(":")[0].replace("\\", "") in (Path(config.run_dir) / "log.txt").read_text()


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"format": 1}', '{"format": 1, "step": 1, "hash_recipe": {}, "tokenizer_digest": 1}'],
)
def test_a_damaged_state(make_config: MakeConfig, content: str) -> None:
    config = make_config(train={"stop_after": 1})
    Trainer(config).fit()
    latest = Path(config.run_dir) / "latest"
    (latest / "state.json").write_text(content)
    checksums = json.loads((latest / "checksums.json").read_text())
    checksums["state.json"] = file_digest(latest / "state.json")
    (latest / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(CheckpointError, match=r"state\.json: is damaged"):
        Trainer(config).fit()
