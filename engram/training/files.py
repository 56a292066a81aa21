"""Files that are whole or absent: written beside their place, flushed to disk, then renamed into it."""

import hashlib
import os
import shutil
from pathlib import Path

# Whatever carries this prefix is unfinished: the next start removes it.
UNFINISHED = ".unfinished_"


def unfinished(path: Path) -> Path:
    """Where `path` is built before it is renamed into place: same folder, so that the rename is atomic."""
    return path.with_name(UNFINISHED + path.name)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`; a crash leaves the old file or the new one, never a part."""
    building = unfinished(path)
    try:
        with open(building, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError:
        building.unlink(missing_ok=True)
        raise
    sync(path.parent)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its sibling `target`, replacing an older link in one step."""
    building = unfinished(link)
    building.unlink(missing_ok=True)
    building.symlink_to(target)
    os.replace(building, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_into_place(building: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`; an older folder of that name goes away whole."""
    if folder.exists():
        remove_folder(folder)
    os.rename(building, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder such that a crash on the way leaves nothing that looks like it."""
    doomed = unfinished(folder.with_name(folder.name + "_removed"))
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> list[str]:
    """Clear away what a killed process left half-written in `folder`, and return the names."""
    leftovers = sorted(folder.glob(UNFINISHED + "*"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]
