"""Where runs live, and how each of them stands.

    <pool>/<id>/        the run folder that train.py writes
    <pool>/jobs/<id>/   config.yaml (what train.py is given)  state.json  log.txt  lock
    <out>/runs/<id>/    the small files of a finished run, which may come from another machine

The lock is held by whoever trains the run, down to the training process itself: it outlives a driver that was killed.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram.config import load_config
from engram.config_identity import run_id
from engram.sweep.grid import Run
from engram.sweep.spec import SweepError

Status = Literal["done", "running", "failed", "lost", "pending"]
# A run on another host counts as lost when its worker has not written for this long.
LOST_AFTER_SECONDS = 120
# Enough for a few lines of metrics with statistics.
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class RunState:
    """How a run stands. `lost`: it was running, and neither its lock nor its heartbeat is there any more."""

    status: Status
    steps: int
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    attempt: int = 0
    host: str = ""
    message: str = ""


@dataclass(frozen=True)
class Pool:
    pool: Path
    out: Path

    def run_folder(self, run: Run) -> Path:
        return self.pool / run.id

    def job_folder(self, run: Run) -> Path:
        return self.pool / "jobs" / run.id

    def log(self, run: Run) -> Path:
        """Output of all attempts at the run."""
        return self.job_folder(run) / "log.txt"

    def finished_folder(self, run: Run) -> Path | None:
        """The folder whose done.json says that the run is finished: the pool's, else the copy in `out`."""
        for folder in (self.run_folder(run), self.out / "runs" / run.id):
            if (folder / "done.json").exists():
                return folder
        return None

    def check_finished(self, run: Run) -> None:
        """Raises SweepError: what counts as this run was trained with other settings."""
        folder = self.finished_folder(run)
        if folder is None or not (folder / "config.yaml").exists():
            return
        found = run_id(load_config(folder / "config.yaml"))
        if found != run.id:
            raise SweepError(
                f"{folder} holds run {found}, but its name says {run.id} ({run.label}): two configs with one id; move "
                "the folder away, and the run is trained anew"
            )

    def claim(self, run: Run) -> int | None:
        """Take the run's lock: an open file descriptor that holds it, or None while another process has it."""
        folder = self.job_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def read_job(self, run: Run) -> dict[str, Any]:
        """Content of state.json; empty where there is none, or none that can be read."""
        try:
            content = json.loads((self.job_folder(run) / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_job(self, run: Run, **changes: Any) -> None:
        """Change entries of state.json in one step; a job folder that was deleted comes back."""
        content = {**self.read_job(run), **changes}
        path = self.job_folder(run) / "state.json"
        building = path.with_name(f".state.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        building.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(building, path)

    def state(self, run: Run) -> RunState:
        """Reads a few small files: a thousand runs take well under a second."""
        steps, job = run.config.train.steps, self.read_job(run)
        common = dict(steps=steps, attempt=job.get("attempt", 0), host=job.get("host", ""))
        finished = self.finished_folder(run)
        if finished is not None:
            last = {**self.last_line(finished), **_read_json(finished / "done.json")}
            return RunState("done", **common, **_progress(last, steps, run.config.tokens_per_step))
        progress = _progress(self.last_line(self.run_folder(run)), steps, run.config.tokens_per_step)
        status, message = self._unfinished(run, job)
        return RunState(status, **common, **progress, message=message)

    def _unfinished(self, run: Run, job: dict[str, Any]) -> tuple[Status, str]:
        message = str(job.get("message", ""))
        if job.get("status") == "failed":
            return "failed", message
        if job.get("status") != "running":
            return "pending", message
        if job.get("host") == socket.gethostname():
            alive = self._is_locked(run)
        else:
            alive = time.time() - float(job.get("heartbeat", 0)) < LOST_AFTER_SECONDS
        return ("running", message) if alive else ("lost", "its worker is gone")

    def _is_locked(self, run: Run) -> bool:
        lock = self.claim(run)
        if lock is None:
            return True
        os.close(lock)
        return False

    def last_line(self, folder: Path) -> dict[str, Any]:
        """The last whole line of a run's metrics.jsonl; empty where there is none."""
        with contextlib.suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            # What follows the last line feed is still being written.
            for line in reversed(file.read().split(b"\n")[:-1]):
                with contextlib.suppress(ValueError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        return found
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _progress(line: dict[str, Any], steps: int, tokens_per_step: int) -> dict[str, Any]:
    step, speed = line.get("step"), _number(line.get("tokens_per_second"))
    step = step if isinstance(step, int) else 0
    return dict(
        step=step,
        loss=_number(line.get("loss")),
        val_loss=_number(line.get("val_loss")),
        tokens_per_second=speed,
        seconds_left=(steps - step) * tokens_per_step / speed if speed else None,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
