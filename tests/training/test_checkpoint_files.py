"""The files of a checkpoint: whole or absent, whatever happens while they are written."""

import errno
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from engram.config import Config
from engram.data.tokenizer import Tokenizer, load_tokenizer
from engram.distributed.world import World
from engram.training import checkpoint_files
from engram.training.checkpoint_files import (
    CheckpointError,
    Contents,
    latest_checkpoint,
    save_step,
    step_folders,
    tensor_files,
    verify,
)
from engram.training.files import point, remove_unfinished

MakeConfig = Callable[..., Config]


@pytest.fixture
def contents(make_config: MakeConfig, data: Path) -> Callable[[int], Contents]:
    """contents(step): a checkpoint whose tensors tell the step."""
    tokenizer: Tokenizer = load_tokenizer(data)

    def make(step: int) -> Contents:
        tensors = {"model": {"a": torch.full((3, 5), step), "b": torch.arange(6.0).view(2, 3).t()}, "optim": {}}
        return Contents(tensors, {"step": step}, make_config(), tokenizer)

    return make


def step_in(folder: Path) -> int:
    """The step that a valid checkpoint holds, the same in all its files."""
    verify(folder)
    step = json.loads((folder / "state.json").read_text())["step"]
    assert torch.equal(tensor_files(folder, "model")["a"], torch.full((3, 5), step))
    return step


def test_written_tensors_come_back(contents: Callable[[int], Contents], tmp_path: Path, data: Path) -> None:
    folder = save_step(tmp_path, 500, contents(500), keep=2)
    assert folder.name == "step_000500"
    assert (tmp_path / "latest").readlink() == Path("step_000500")
    # A view that is not contiguous in memory keeps its values and shape.
    assert torch.equal(tensor_files(folder, "model")["b"], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert load_tokenizer(folder).digest == load_tokenizer(data).digest
    # All files are as open as the umask makes any file.
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_k_stay(contents: Callable[[int], Contents], tmp_path: Path, keep: int, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, contents(step), keep)
    assert [step_in(folder) for folder in step_folders(tmp_path)] == kept
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000004"


def test_steps_sort_as_numbers(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        save_step(tmp_path, step, contents(step), keep=3)
    assert [step_in(folder) for folder in step_folders(tmp_path)] == [20, 999_999, 1_000_000]


def test_a_run_set_back_replaces_the_later_steps(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step, contents(step), keep=3)
    point(tmp_path / "latest", "step_000001")
    save_step(tmp_path, 2, contents(2), keep=2)
    assert [path.name for path in step_folders(tmp_path)] == ["step_000001", "step_000002", "step_000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"


# ------------------------------------------------------------------------------------------------- kills and full disks

OPERATIONS: list[tuple[Any, str]] = [
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "symlink", "chmod", "unlink", "rmdir")),
    (checkpoint_files, "save_file"),
]


def die_before(operation: int, run: Callable[[], Any]) -> bool:
    """Run in a child that kills itself before its file operation of this number; False where it has fewer."""

    def child() -> None:
        counter = itertools.count()

        def deadly(original: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(counter) == operation:
                    os.kill(os.getpid(), 9)
                return original(*args, **kwargs)

            return call

        for owner, name in OPERATIONS:
            setattr(owner, name, deadly(getattr(owner, name)))
        run()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_a_kill_at_any_operation_leaves_a_valid_latest(
    contents: Callable[[int], Contents], tmp_path: Path, before: list[int]
) -> None:
    new = len(before) + 1
    for operation in itertools.count():
        run_dir = tmp_path / str(operation)
        for step in before:
            save_step(run_dir, step, contents(step), keep=2)
        run_dir.mkdir(exist_ok=True)
        killed = die_before(operation, lambda run_dir=run_dir: save_step(run_dir, new, contents(new), keep=2))
        found = latest_checkpoint(run_dir)
        # What is called step_... is whole, also while an old one is being removed.
        assert {step_in(folder) for folder in step_folders(run_dir)} <= {*before, new}
        assert (step_in(found) if found else 0) in ({new} if not killed else {new - 1, new})
        # The next start clears up, and can save the same step.
        remove_unfinished(run_dir)
        assert {path.name for path in run_dir.iterdir()} <= {"latest", *(f"step_{step:06d}" for step in (1, 2, 3))}
        save_step(run_dir, new, contents(new), keep=2)
        assert [step_in(folder) for folder in step_folders(run_dir)] == [*before, new][-2:]
        if not killed:
            break
    assert operation > 10


@pytest.mark.parametrize("failing", ["save_file", "save_config", "sync", "move_into_place"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    contents: Callable[[int], Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_step(tmp_path, 1, contents(1), keep=1)

    def full(*_: object, **__: object) -> None:
        if failing == "save_file":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, failing, full)
        with pytest.raises(
            CheckpointError, match=r"step_000002: cannot be written .*No space left.* free space .*step_000001 is whole"
        ):
            save_step(tmp_path, 2, contents(2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert step_in(tmp_path / "latest") == 1


# --------------------------------------------------------------------------------------------------------------- damage


def damaged(contents: Contents, run_dir: Path, damage: Callable[[Path], Any]) -> Path:
    for step in (3, 6):
        folder = save_step(run_dir, step, contents, keep=2)
    damage(folder)
    return folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FILES = ["model.safetensors", "optim.safetensors", "state.json", "config.yaml", "tokenizer.model"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_damage_is_named_with_a_way_out(
    contents: Callable[[int], Contents], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = damaged(contents(6), tmp_path, lambda folder: damage(folder / name))
    what = "is missing" if damage is Path.unlink else "is damaged: its sha256"
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert f"{folder / name}: {what}" in str(caught.value)
    assert "delete step_000006 and `latest` to go on from step_000003" in str(caught.value)
    verify(folder.with_name("step_000003"))


def test_ranks_share_the_files_out(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    found_by: dict[str, list[int]] = {}
    for name in FILES:
        folder = save_step(tmp_path, 3, contents(3), keep=1)
        flip_a_bit(folder / name)
        for world in worlds:
            try:
                verify(folder, world)
            except CheckpointError as error:
                assert f"{name}: is damaged" in str(error)
                found_by.setdefault(name, []).append(world.rank)
    # One rank reads each, and every rank some.
    assert found_by.keys() == set(FILES) and all(len(ranks) == 1 for ranks in found_by.values())
    assert {ranks[0] for ranks in found_by.values()} == {0, 1, 2}


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free space on this disk, or lower train.keep_checkpoints"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "free space on this disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free space on this disk"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "put that right"),
    ],
)
def test_advice_is_about_what_went_wrong(
    contents: Callable[[int], Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint_files, "save_file", fail)
    with pytest.raises(CheckpointError, match=f"cannot be written .*: {advice}.*; there is no checkpoint yet"):
        save_step(tmp_path, 3, contents(3), keep=1)


def test_damaged_and_missing_checksums(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    folder = damaged(contents(6), tmp_path, lambda folder: cut_short(folder / "checksums.json"))
    (folder / "checksums.json").write_text('{"model')
    with pytest.raises(CheckpointError, match=r"checksums\.json: is damaged"):
        verify(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: checksums\.json is missing: delete step_000006 "):
        verify(folder)
    # A folder that was never one is not to be deleted.
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: checksums\.json is missing$"):
        verify(folder.parent)


def test_a_broken_pointer_names_the_alternatives(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    save_step(tmp_path, 3, contents(3), keep=1)
    point(tmp_path / "latest", "step_000099")
    with pytest.raises(CheckpointError, match="step_000099, which does not exist: point it to one of step_000003"):
        latest_checkpoint(tmp_path)


def test_without_a_pointer_the_newest_folder_counts(contents: Callable[[int], Contents], tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    save_step(tmp_path, 3, contents(3), keep=1)
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000003"
