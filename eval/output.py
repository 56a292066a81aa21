"""The folder that an evaluation writes into."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram.config import UserError
from engram.training.files import write_atomically


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
