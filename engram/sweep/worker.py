"""One run, trained by `train.py` in a process of its own, with its lock, its state and its log."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from engram.config import save_config
from engram.sweep.grid import Run
from engram.sweep.pool import Pool

TRAIN = Path(__file__).parents[2] / "train.py"
HEARTBEAT_SECONDS = 10.0
# What `train.py` says by its exit status, and what OpenMP and MKL take their number of threads from.
DONE, DIVERGED, INTERRUPTED = 0, 3, 130
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """`elsewhere`: another process is training the run. `interrupted`: it saved, and goes on at the next start."""

    status: Literal["done", "failed", "interrupted", "elsewhere"]
    message: str = ""


class Job:
    """A training process, and the run's lock, which that process holds as well."""

    def __init__(self, run: Run, pool: Pool, process: subprocess.Popen[bytes], lock: int) -> None:
        self.run, self.pool = run, pool
        self.process = process
        self.started = self._beaten = time.time()
        self._lock = lock

    @classmethod
    def start(
        cls,
        run: Run,
        pool: Pool,
        *,
        threads: int | None = None,
        gpu: str | None = None,
        command: Sequence[str] | None = None,
    ) -> Self | Outcome:
        """Start training, or say why not: done by now, or another process trains it.

        threads: of the training, unless its config says how many. command: in place of `python train.py`.
        """
        lock = pool.claim(run)
        if lock is None:
            return Outcome("elsewhere")
        try:
            # Finished by another driver between a look at its state and the claim.
            if pool.finished_folder(run) is not None:
                os.close(lock)
                return Outcome("done")
            process = _spawn(run, pool, lock, threads, gpu, command or (sys.executable, str(TRAIN)))
        except BaseException:
            os.close(lock)
            raise
        job = cls(run, pool, process, lock)
        attempt = pool.read_job(run).get("attempt", 0) + 1
        pool.write_job(
            run,
            status="running",
            attempt=attempt,
            pid=process.pid,
            host=socket.gethostname(),
            started=job.started,
            heartbeat=job.started,
            ended=None,
            exit_code=None,
            message="",
        )
        return job

    def poll(self) -> Outcome | None:
        """The outcome of a training that has ended; None, and a heartbeat now and then, while it goes on."""
        code = self.process.poll()
        if code is None:
            now = time.time()
            if now - self._beaten >= HEARTBEAT_SECONDS:
                self._beaten = now
                self.pool.write_job(self.run, heartbeat=now)
            return None
        outcome = self._outcome(code)
        status = "pending" if outcome.status == "interrupted" else outcome.status
        self.pool.write_job(self.run, status=status, ended=time.time(), exit_code=code, message=outcome.message)
        os.close(self._lock)
        return outcome

    def interrupt(self) -> None:
        """Ask the training to save and stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def _outcome(self, code: int) -> Outcome:
        if code == DONE and self.pool.finished_folder(self.run) is not None:
            return Outcome("done")
        if code == INTERRUPTED:
            return Outcome("interrupted", "interrupted")
        said = last_lines(self.pool.log(self.run), 1)
        if code < 0:
            return Outcome("failed", f"killed by signal {-code} ({signal.Signals(-code).name})")
        if code == DONE:
            return Outcome("failed", "ended without finishing: its run folder was removed, or train.stop_after is set")
        if code == DIVERGED:
            return Outcome("failed", "diverged: its run folder holds a post-mortem")
        return Outcome("failed", f"exit status {code}: {said}")


def execute(run: Run, pool: Pool, *, threads: int | None = None, command: Sequence[str] | None = None) -> Outcome:
    """Train one run to its end, as a cluster's job does."""
    job = Job.start(run, pool, threads=threads, command=command)
    if isinstance(job, Outcome):
        return job
    while (outcome := job.poll()) is None:
        time.sleep(0.5)
    return outcome


def last_lines(path: Path, count: int) -> str:
    """The last `count` lines of a log that say something."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return f"{path} cannot be read"
    return "\n".join([line for line in lines if line.strip()][-count:])


def _spawn(
    run: Run, pool: Pool, lock: int, threads: int | None, gpu: str | None, command: Sequence[str]
) -> subprocess.Popen[bytes]:
    folder = pool.job_folder(run)
    save_config(run.config, folder / "config.yaml")
    environment = dict(os.environ)
    overrides = []
    if threads is not None and run.config.train.threads is None:
        overrides.append(f"train.threads={threads}")
        environment |= dict.fromkeys(_THREADS, str(threads))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(pool.log(run), "ab") as log:
        return subprocess.Popen(
            [*command, str(folder / "config.yaml"), *overrides],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches the driver alone, which then asks every training to save.
            start_new_session=True,
            pass_fds=(lock,),
        )
