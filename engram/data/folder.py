"""One writer at a time, and all or nothing: the lock and the rename around a folder."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engram.data.errors import DataError
from engram.data.manifest import NAME
from engram.data.progress import Progress


@contextlib.contextmanager
def alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of a folder (a hidden file beside it, removed afterwards); wait for whoever holds it."""
    path = folder.absolute().with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say(f"{folder}: another process is preparing it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us removed the file that we locked: then it locks nobody out, and we try again.
            if not _is_still(path, file.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def check_replaceable(folder: Path) -> None:
    """Raise DataError where a folder holds something that `prepare` did not make."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: data.path is a file: name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NAME).exists():
        raise DataError(
            f"{folder}: holds files but no {NAME}, so it is not a prepared folder and will not be replaced: "
            "choose another data.path"
        )


def replace_folder(folder: Path, finished: Path) -> None:
    """Put a finished folder in its place with one rename; what stood there is removed."""
    previous = folder.absolute().with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    finished.rename(folder)
    for changed in (folder, folder.absolute().parent):
        descriptor = os.open(changed, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(previous, ignore_errors=True)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
