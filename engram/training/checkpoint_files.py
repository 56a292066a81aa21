"""A checkpoint on disk: safetensors and JSON with checksums, written such that a crash leaves it whole or absent.

step_000500/  model.safetensors  optim.safetensors  state.json  config.yaml  tokenizer.*  checksums.json

Of several ranks, the first writes these, and all write model-*.safetensors and optim-*.safetensors of their own (see
tensor_files.py); checksums.json, written last, counts them all.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engram.config import Config, ConfigError, UserError, load_config, save_config
from engram.data.tokenizer import Tokenizer
from engram.distributed.world import SINGLE, RankError, World
from engram.training.files import move_into_place, point, remove_folder, sha256, sync, unfinished
from engram.training.tensor_files import TensorFiles, TensorFilesError

LATEST = "latest"
CHECKSUMS = "checksums.json"
# No folder without these is a checkpoint.
ESSENTIAL = ("model.safetensors", "state.json", "config.yaml")


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is incomplete or damaged, or belongs to something else."""


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint, or into a post-mortem folder."""

    # Name of each safetensors file -> its tensors: "model" holds parameters and persistent buffers, "optim" moments.
    # Of what this rank writes, if there are several. May be made as it is written, so that not all is in memory.
    tensors: Mapping[str, Mapping[str, Tensor]] | Iterable[tuple[str, Mapping[str, Tensor]]]
    state: dict[str, Any]
    config: Config
    tokenizer: Tokenizer

    def files(self) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
        return self.tensors.items() if isinstance(self.tensors, Mapping) else self.tensors


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((path for path in run_dir.glob("step_*") if path.name[len("step_") :].isdigit()), key=step_of)


class FolderWriter:
    """One checkpoint on its way to disk: begun and completed by all ranks together; each writes its own part between.

    What was written is removed where the disk of one rank does not take it; older folders stay as they are.
    """

    def __init__(self, folder: Path, contents: Contents, world: World = SINGLE) -> None:
        self.folder = folder
        self._contents = contents
        self._world = world
        self._building = unfinished(folder)
        self._checksums: dict[str, str] = {}
        self._error: Exception | None = None

    def begin(self) -> None:
        """Make the folder beside its place. Raises CheckpointError, on all ranks."""
        with self._explained(), self._world.together():
            if self._world.is_first:
                shutil.rmtree(self._building, ignore_errors=True)
                self._building.mkdir(parents=True)

    def write(self) -> None:
        """Write this rank's tensors and flush them to disk; `complete` tells where that failed.

        Communicates only where the tensors are made while they are written.
        """
        for name, tensors in self._contents.files():
            # Making tensors may take all ranks: one whose disk is full still takes part.
            if self._error is None:
                try:
                    path = self._building / f"{name}.safetensors"
                    self._checksums[path.name] = _write(path, tensors)
                except Exception as error:
                    # Whatever it is, the others learn of it in `complete`.
                    self._error = error
            # The next file is made without this one in memory.
            del tensors

    def complete(self) -> None:
        """Write what is written once, checksums last, and rename the folder. Raises CheckpointError, on all ranks."""
        with self._explained():
            with self._world.together():
                if self._error is not None:
                    raise self._error
            checksums = {name: digest for each in self._world.gather(self._checksums) for name, digest in each.items()}
            with self._world.together():
                if self._world.is_first:
                    _write_rest(self._building, self._contents, checksums)
                    move_into_place(self._building, self.folder)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RankError) as error:
            if self._world.is_first:
                shutil.rmtree(self._building, ignore_errors=True)
            kept = latest_checkpoint(self.folder.parent)
            full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
            advice = "free space on this disk, or lower train.keep_checkpoints" if full else "put that right"
            left = (
                f"{kept.name} is whole, and the same command resumes from it" if kept else "there is no checkpoint yet"
            )
            failure = CheckpointError(f"{self.folder}: cannot be written ({error}): {advice}; {left}")
            failure.of_another_rank = isinstance(error, RankError)
            raise failure from error


def write_folder(folder: Path, contents: Contents, world: World = SINGLE) -> None:
    """Write `folder` beside its place, flush it to disk, and rename it; all ranks together. Raises CheckpointError."""
    writer = FolderWriter(folder, contents, world)
    writer.begin()
    writer.write()
    writer.complete()


def save_step(run_dir: Path, step: int, contents: Contents, keep: int, world: World = SINGLE) -> Path:
    """Save `run_dir/step_<step>`, point `latest` to it, keep the newest `keep`. Raises CheckpointError: disk full."""
    folder = step_folder(run_dir, step)
    write_folder(folder, contents, world)
    point_to(folder, world)
    with world.together():
        if world.is_first:
            remove_older(folder, keep)
    return folder


def point_to(folder: Path, world: World = SINGLE) -> None:
    """Let `latest` point to this new checkpoint."""
    with world.together():
        if world.is_first:
            point(folder.parent / LATEST, folder.name)


def remove_older(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of its run, of which `folder` is the last."""
    # A run set back to an earlier checkpoint may still hold later ones: they do not count as newer than this.
    until_now = [path for path in step_folders(folder.parent) if step_of(path) <= step_of(folder)]
    for old in until_now[:-keep]:
        remove_folder(old)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint that `latest` points to; None for a run without one. Raises CheckpointError: a broken pointer."""
    run_dir = Path(run_dir)
    pointer = run_dir / LATEST
    if not pointer.is_symlink():
        # Killed between the rename of the first checkpoint and its pointer: a folder of this name is whole.
        return next(reversed(step_folders(run_dir)), None)
    folder = run_dir / os.readlink(pointer)
    if not folder.is_dir():
        others = [path.name for path in step_folders(run_dir)]
        raise CheckpointError(
            f"{pointer}: points to {folder.name}, which does not exist: "
            + (f"point it to one of {', '.join(others)} (ln -sfn)" if others else "delete it to start the run anew")
        )
    return folder


def verify(folder: Path, world: World = SINGLE) -> None:
    """Compare every file with its checksum; of several ranks, each reads its part of the files.

    Raises CheckpointError naming the file and what to do, on the rank that found it.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        if not isinstance(checksums, dict) or not checksums.keys() >= set(ESSENTIAL):
            raise ValueError
    except FileNotFoundError:
        # Any other folder was never one: there is nothing to restore.
        advice = f": {other_checkpoint(folder)}" if folder in step_folders(folder.parent) else ""
        raise CheckpointError(f"{folder}: is not a checkpoint: {CHECKSUMS} is missing{advice}") from None
    except ValueError:
        raise CheckpointError(f"{folder / CHECKSUMS}: is damaged: {other_checkpoint(folder)}") from None
    for name in checksums:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing: {other_checkpoint(folder)}")
    for name, expected in list(checksums.items())[world.rank :: world.size]:
        path = folder / name
        if (found := sha256(path)) != expected:
            raise CheckpointError(
                f"{path}: is damaged: its sha256 is {found[:12]}..., but {CHECKSUMS} says {str(expected)[:12]}...: "
                + other_checkpoint(folder)
            )


def read_state(folder: Path) -> dict[str, Any]:
    """Content of `state.json`. Raises CheckpointError: not an object with a format."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
    except ValueError:
        state = None
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: is damaged: {other_checkpoint(folder)}")
    return state


def tensor_files(folder: Path, kind: str) -> TensorFiles:
    """The tensors of `model` or `optim`. Raises CheckpointError."""
    try:
        return TensorFiles(folder, kind)
    except TensorFilesError as error:
        raise CheckpointError(f"{error}: {other_checkpoint(folder)}") from None


def read_config(folder: Path) -> Config:
    """The config that the checkpoint was trained with. Raises CheckpointError."""
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error}\nthis checkpoint was written by other code: use that of code.json") from None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    # safetensors makes files that only their owner may read, whatever the umask.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync(path)
    return sha256(path)


def _write_rest(building: Path, contents: Contents, checksums: dict[str, str]) -> None:
    """All that is written once, checksums last."""
    tensors = set(building.iterdir())
    (building / "state.json").write_text(json.dumps(contents.state))
    save_config(contents.config, building / "config.yaml")
    contents.tokenizer.save(building)
    rest = sorted(set(building.iterdir()) - tensors)
    checksums = dict(sorted((checksums | {path.name: sha256(path) for path in rest}).items()))
    (building / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")
    for path in (*rest, building / CHECKSUMS, building):
        sync(path)


def other_checkpoint(folder: Path) -> str:
    """What to do about a damaged checkpoint, as the end of a message."""
    others = [path.name for path in step_folders(folder.parent) if path.name != folder.name]
    if not others:
        return "restore it from a copy, or delete the run folder and start anew"
    return f"delete {folder.name} and `latest` to go on from {others[-1]}"
