"""Where runs live, and how each of them stands.

    <pool>/<id>/        the run folder that train.py writes
    <pool>/jobs/<id>/   config.yaml (what train.py is given)  state.json  queued.json (by `submit`)  log.txt  lock
    <out>/runs/<id>/    the small files of a finished run, which may come from another machine

The lock is held by whoever trains the run, down to the training process itself: it outlives a driver that was killed.
Not every file system carries locks from host to host: there, state.json is the lease, written anew with each heartbeat.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram.config import ConfigError, load_config
from engram.config_identity import run_id
from engram.sweep.grid import Run
from engram.sweep.spec import SweepError
from engram.sweep.tail import last_metrics, number, read_object

Status = Literal["done", "running", "failed", "damaged", "lost", "pending"]
# A run on another host counts as lost when its worker has not written for this long.
LOST_AFTER_SECONDS = 120
# Whoever looks whether a lock is held has it for an instant: a claim tries again before it gives up.
_CLAIM_TRIES, _CLAIM_PAUSE = 3, 0.01
_ANEW = "move {} away, and `run` trains the run anew"


@dataclass(frozen=True)
class RunState:
    """How a run stands. `lost`: it was running, and neither its lock nor its heartbeat is there any more. `damaged`: it
    was finished, and its files have lost something since.
    """

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

    def is_done(self, run: Run) -> bool:
        return self.finished_folder(run) is not None

    def finished_folder(self, run: Run) -> Path | None:
        """The whole folder whose done.json says that the run is finished: the pool's, else the copy in `out`."""
        return next((folder for folder in self.finished_folders(run) if not damage(folder)), None)

    def damage(self, run: Run) -> str:
        """What is wrong with a finished run of which no whole folder is left; empty for every other run."""
        found = [damage(folder) for folder in self.finished_folders(run)]
        return found[0] if all(found) and found else ""

    def copy_folder(self, run: Run) -> Path:
        return self.out / "runs" / run.id

    def finished_folders(self, run: Run) -> list[Path]:
        """Those with a done.json, whole or damaged, the pool's before the copy."""
        return [folder for folder in (self.run_folder(run), self.copy_folder(run)) if (folder / "done.json").exists()]

    def prepare(self) -> None:
        """Make the pool's folders. Raises SweepError: they cannot be written."""
        try:
            (self.pool / "jobs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"pool {self.pool}: cannot be written ({error.strerror}): choose another") from None

    def check(self, run: Run) -> str:
        """What is wrong with what is kept under the run's id, and what to do; empty where nothing is. Reads its config,
        which `state` has no time for.
        """
        if wrong := self.damage(run):
            return wrong
        finished = self.finished_folder(run)
        folder = finished or self.job_folder(run)
        if not (folder / "config.yaml").exists():
            return ""
        try:
            found = run_id(load_config(folder / "config.yaml"))
        except ConfigError as error:
            # A job's own config is written anew at the next start.
            return f"{error}; {_ANEW.format(folder)}" if finished else ""
        return "" if found == run.id else f"{folder} holds run {found}, not {run.id}; {_ANEW.format(folder)}"

    def claim(self, run: Run) -> int | None:
        """Take the run's lock: an open file descriptor that holds it, or None while another process has it."""
        folder = self.job_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(_CLAIM_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(_CLAIM_PAUSE)
        os.close(lock)
        return None

    @contextlib.contextmanager
    def held(self, run: Run) -> Iterator[bool]:
        """Whether the run's lock could be taken; it is kept while the block lasts."""
        lock = self.claim(run)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                os.close(lock)

    def is_trained_by_hand(self, run: Run) -> bool:
        """Whether a `train.py` that nobody here has started holds the run folder. Ask before a start, not to look on:
        the question itself could turn away a training that begins at this instant.
        """
        return _is_locked(self.run_folder(run) / "lock")

    def read_job(self, run: Run) -> dict[str, Any]:
        """Content of state.json; empty where there is none, or none that can be read."""
        return read_object(self.job_folder(run) / "state.json")

    def write_job(self, run: Run, **changes: Any) -> None:
        """Change entries of state.json in one step; a job folder that was deleted comes back."""
        content = {**self.read_job(run), **changes}
        path = self.job_folder(run) / "state.json"
        building = path.with_name(f".state.{socket.gethostname()}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        building.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(building, path)

    def state(self, run: Run) -> RunState:
        """Reads a few small files: a thousand runs take well under a second."""
        steps, job = run.config.train.steps, self.read_job(run)
        common = dict(steps=steps, attempt=job.get("attempt", 0), host=job.get("host", ""))
        finished = self.finished_folder(run)
        if finished is not None:
            last = last_metrics(finished / "metrics.jsonl") | read_object(finished / "done.json")
            return RunState("done", **common, **_progress(last, steps, run.config.tokens_per_step))
        last = last_metrics(self.run_folder(run) / "metrics.jsonl")
        wrong = self.damage(run)
        status, message = self._unfinished(run, job)
        if wrong:
            status, message = "damaged", wrong
        return RunState(status, **common, **_progress(last, steps, run.config.tokens_per_step), message=message)

    def runs_on_another_host(self, run: Run) -> bool:
        """By signs of life. A cluster's task that was queued again is the same task: its former self is gone."""
        job, task = self.read_job(run), slurm_task()
        if job.get("status") != "running" or job.get("host") == socket.gethostname():
            return False
        return self._lives(run, job) and (task is None or job.get("slurm_task") != task)

    def _lives(self, run: Run, job: dict[str, Any]) -> bool:
        """Clocks of two hosts may differ: besides the time that the worker wrote down, those at which its files were
        written count. A time that lies ahead as far says no more than one long past.
        """
        now, signs = time.time(), [number(job.get("heartbeat")) or 0]
        for path in (self.job_folder(run) / "state.json", self.run_folder(run) / "metrics.jsonl"):
            with contextlib.suppress(OSError):
                signs.append(path.stat().st_mtime)
        return any(abs(now - sign) < LOST_AFTER_SECONDS for sign in signs)

    def _unfinished(self, run: Run, job: dict[str, Any]) -> tuple[Status, str]:
        message = str(job.get("message", ""))
        if job.get("status") == "failed":
            return "failed", message
        if job.get("status") != "running":
            return "pending", message
        here = job.get("host") == socket.gethostname()
        alive = _is_locked(self.job_folder(run) / "lock") if here else self._lives(run, job)
        return ("running", message) if alive else ("lost", "its worker is gone")


def damage(folder: Path) -> str:
    """What the folder of a finished run has lost, and what to do; empty where its files end as they should."""
    done = read_object(folder / "done.json").get("step")
    if not isinstance(done, int):
        wrong = "its done.json names no step"
    elif not (folder / "config.yaml").exists():
        wrong = "it has no config.yaml that says what was trained"
    elif (last := last_metrics(folder / "metrics.jsonl").get("step")) != done:
        wrong = f"its metrics.jsonl ends at step {last or 0}, but it was trained to step {done}"
    else:
        return ""
    return f"{folder} is damaged: {wrong}; {_ANEW.format(folder)}"


def slurm_task() -> str | None:
    """Id of the cluster's task that this process is, None outside of one. A task that is queued again keeps it."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")


def _is_locked(path: Path) -> bool:
    """Asked with a shared lock and read access: onlookers need no right to write, and do not see each other."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _progress(line: dict[str, Any], steps: int, tokens_per_step: int) -> dict[str, Any]:
    step, speed = line.get("step"), number(line.get("tokens_per_second"))
    step = step if isinstance(step, int) else 0
    return dict(
        step=step,
        loss=number(line.get("loss")),
        val_loss=number(line.get("val_loss")),
        tokens_per_second=speed,
        seconds_left=(steps - step) * tokens_per_step / speed if speed else None,
    )
