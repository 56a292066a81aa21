"""Ends of files that another process is still writing: metrics of a run, and the log of its training."""

import json
import math
import os
from pathlib import Path
from typing import Any

# Enough for some lines; longer ones are looked for in ever larger pieces, up to the limit.
_PIECE, _LIMIT = 16_384, 4_194_304


def last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl, with the last `val_loss` before it; empty where there is none."""
    size = _PIECE
    while True:
        piece, complete = _end(path, size)
        # What follows the last line feed is still being written; what a piece begins with was cut.
        lines = piece.split(b"\n")[0 if complete else 1 : -1]
        found = next((parsed for line in reversed(lines) if (parsed := _parse(line))), {})
        if found or complete or size >= _LIMIT:
            return found | _last_evaluation(lines)
        size *= 8


def last_lines(path: Path, count: int, start: int = 0) -> str:
    """The last `count` lines after byte `start` of a log that say something, an unfinished one included."""
    lines = _end(path, _PIECE, start)[0].decode(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-count:])


def number(value: Any) -> float | None:
    """A finite number as it is, None for everything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read."""
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def _last_evaluation(lines: list[bytes]) -> dict[str, Any]:
    for line in reversed(lines):
        if b'"val_loss"' in line and (loss := number(_parse(line).get("val_loss"))) is not None:
            return {"val_loss": loss}
    return {}


def _end(path: Path, size: int, start: int = 0) -> tuple[bytes, bool]:
    """The last `size` bytes after `start`, and whether that is all; nothing where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            begin = os.fstat(file.fileno()).st_size - size
            file.seek(max(start, begin))
            return file.read(), begin <= start
    except OSError:
        return b"", True


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
