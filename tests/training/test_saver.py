"""Checkpoints written beside training: what was there when they were asked for, whole or absent."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engram.config import Config
from engram.data.tokenizer import load_tokenizer
from engram.distributed.world import SINGLE
from engram.training import checkpoint_files
from engram.training.checkpoint_files import (
    CheckpointError,
    Contents,
    latest_checkpoint,
    step_folders,
    tensor_files,
    verify,
)
from engram.training.saver import CheckpointSaver
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint

MakeConfig = Callable[..., Config]


class SlowDisk:
    """Writes tensors once it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = threading.Event()
        self.fails = False
        self._save = checkpoint_files.save_file
        monkeypatch.setattr(checkpoint_files, "save_file", self.save)

    def save(self, tensors: dict[str, Tensor], path: Path) -> None:
        assert self.ready.wait(timeout=20)
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._save(tensors, path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


@pytest.fixture
def contents(make_config: MakeConfig, data: Path) -> Callable[[Tensor], Contents]:
    def make(weight: Tensor) -> Contents:
        # Every other row: not contiguous.
        tensors = {"model": {"weight": weight[::2], "step": torch.tensor(3)}, "optim": {"moment": weight}}
        return Contents(tensors, {"step": 3}, make_config(), load_tokenizer(data))

    return make


def test_training_goes_on_while_a_checkpoint_is_written(
    contents: Callable[[Tensor], Contents], disk: SlowDisk, tmp_path: Path
) -> None:
    weight = torch.arange(12.0).view(4, 3)
    saver = CheckpointSaver(tmp_path, 2, SINGLE, beside_training=True)
    with saver:
        saver.save(1, contents(weight))
        weight.zero_()
        saver.poll()
        # It counts only when it is whole.
        assert latest_checkpoint(tmp_path) is None
        assert step_folders(tmp_path) == []
        disk.ready.set()
        saver.wait()
        assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
        # A second one, into the same copies, and completed by the end.
        saver.save(2, contents(weight + 7))
    for step, expected in ((1, torch.arange(12.0).view(4, 3)), (2, torch.full((4, 3), 7.0))):
        folder = tmp_path / f"step_{step:06d}"
        verify(folder)
        assert torch.equal(tensor_files(folder, "model")["weight"], expected[::2])
        assert torch.equal(tensor_files(folder, "optim")["moment"], expected)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"


def test_a_full_disk_is_told_by_the_next_poll(
    contents: Callable[[Tensor], Contents], disk: SlowDisk, tmp_path: Path
) -> None:
    saver = CheckpointSaver(tmp_path, 1, SINGLE, beside_training=True)
    disk.ready.set()
    saver.save(1, contents(torch.ones(4, 3)))
    saver.wait()
    disk.fails = True
    saver.save(2, contents(torch.ones(4, 3)))
    with pytest.raises(CheckpointError, match=r"step_000002: cannot be written .*No space left.*step_000001 is whole"):
        saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    # What failed is forgotten.
    disk.fails = False
    with saver:
        saver.save(3, contents(torch.ones(4, 3)))
    assert [path.name for path in step_folders(tmp_path)] == ["step_000003"]


def test_what_is_older_is_deleted_beside_training_too(
    contents: Callable[[Tensor], Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def remove(folder: Path) -> None:
        begun.set()
        assert go.wait(timeout=20)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(checkpoint_files, "remove_folder", remove)
    with CheckpointSaver(tmp_path, 1, SINGLE, beside_training=True) as saver:
        for step in (1, 2):
            saver.save(step, contents(torch.ones(4, 3)))
            saver.wait()
        # The new one counts, though the old one is still there.
        assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"
        assert begun.wait(timeout=20) and (tmp_path / "step_000001").exists()
        saver.save(3, contents(torch.ones(4, 3)))
        go.set()
        # Told once the next one is safe.
        with pytest.raises(PermissionError, match="step_000001"):
            saver.wait()
        assert latest_checkpoint(tmp_path) == tmp_path / "step_000003"


def test_runs_end_alike(make_config: MakeConfig, tmp_path: Path) -> None:
    configs = [
        make_config(run_dir=str(tmp_path / str(beside)), train={"async_checkpoints": beside, "keep_checkpoints": 9})
        for beside in (False, True)
    ]
    for config in configs:
        assert Trainer(config).fit() is Exit.DONE
    folders = [[path.name for path in step_folders(Path(config.run_dir))] for config in configs]
    assert folders[0] == folders[1] == ["step_000003", "step_000006", "step_000009"]
    for name in folders[0]:
        assert_same_checkpoint(*(Path(config.run_dir) / name for config in configs))


def test_an_error_of_training_leaves_what_was_being_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train={"async_checkpoints": True})

    def step(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state.step == 3:
            raise ZeroDivisionError
        return take_step(trainer, *arguments)

    take_step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(ZeroDivisionError):
        Trainer(config).fit()
    verify(Path(config.run_dir) / "step_000003")
