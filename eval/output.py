"""The folder that an evaluation writes into."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram.config import UserError
from engram.training.files import write_atomically


def check_out(out: Path) -> None:
    """Before anything is measured. Raises UserError where `out` is no folder, nor can become one."""
    if out.is_file():
        raise UserError(f"{out}: is a file: name a folder with --out")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written into" if there.is_dir() else "is a file"
        raise UserError(f"{out}: {there} {what}: name another folder with --out")


@contextmanager
def writing_into(out: Path) -> Iterator[None]:
    """Raises UserError where what the block writes into the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}: name another folder with --out") from None


def write_provenance(out: Path, facts: Mapping[str, Any]) -> None:
    """`provenance.json`: what was measured, on what, with which code."""
    write_atomically(out / "provenance.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
