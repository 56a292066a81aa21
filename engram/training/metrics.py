"""`metrics.jsonl`: one JSON object per logged step, for machines; each step stands in it once, resumed or not.

Keys: step, tokens (seen so far), loss (mean over the step's targets, in nats; with balance losses, where configured),
lr, grad_norm (before clipping), tokens_per_second (since the last line, without evaluation and saving); val_loss on
evaluation steps; `layer_01/...` on statistics steps. Loss and grad_norm of a skipped step are null.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engram.config import UserError
from engram.training.files import write_atomically


class MetricsFile:
    """Appends lines, each on disk as soon as it is written."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Continue `path` after `resume_step`: lines that a killed process wrote past its checkpoint are cut off."""
        cut_after(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line. Non-finite numbers become null, which every JSON parser reads."""
        self._file.write(json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    lines = _text(path).split("\n")
    # What follows the last line feed is empty, or unfinished.
    return [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines[:-1], start=1)]


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps than `step`, leaving the file as it is where there are none."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.exists() and text != _text(path):
        write_atomically(path, text)


def _text(path: Path) -> str:
    # A damaged byte makes its line unreadable, not the file.
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
    except ValueError:
        raise UserError(f"{where} is not JSON: repair or remove that line") from None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        raise UserError(f"{where} is no object with a step: repair or remove that line")
    return metrics


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
