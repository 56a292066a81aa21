"""One run, trained by `train.py` in a process of its own, with its lock, its state and its log."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from engram.config import save_config
from engram.sweep.grid import Run
from engram.sweep.pool import Pool, slurm_task
from engram.sweep.tail import last_lines

TRAIN = Path(__file__).parents[2] / "train.py"
# Several of them fit into the time after which a run on another host counts as lost.
HEARTBEAT_SECONDS = 10.0
# What `train.py` says by its exit status, and what OpenMP and MKL take their number of threads from.
DONE, DIVERGED, INTERRUPTED = 0, 3, 130
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Sent from outside, by people, clusters and the kernel that runs out of memory; the other signals are crashes.
_STOPPED_BY = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGXCPU)
_GOES_ON = "goes on from its last checkpoint at the next call"
# With which Python ends on a KeyboardInterrupt that a library has turned into another exception.
_TRACEBACK = 1


@dataclass(frozen=True)
class Outcome:
    """`elsewhere`: another process is training the run. `interrupted`: the next start goes on from a checkpoint.

    `exit_code` is the training's, negative for a signal; None where no training has ended here. `settled`: the run was
    found as it is, and nothing was tried here.
    """

    status: Literal["done", "failed", "interrupted", "elsewhere"]
    message: str = ""
    exit_code: int | None = None
    settled: bool = False


class Job:
    """A training process, and the run's lock, which that process holds as well."""

    def __init__(
        self,
        run: Run,
        pool: Pool,
        process: subprocess.Popen[bytes],
        lock: int,
        log_start: int,
        lease: dict[str, Any],
    ) -> None:
        self.run, self.pool = run, pool
        self.started = self._beaten = time.time()
        self._process, self._lock = process, lock
        # Written whole with each heartbeat: a job folder that was deleted comes back with all of it.
        self._lease = lease
        # Where the output of this attempt begins in the log.
        self._log_start = log_start
        self._outcome: Outcome | None = None
        self._asked = self._killed = self._taken_over = False

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
        """Start training, or say why not: done or failed by now, trained by another process, or it cannot be started.

        threads: of the training, unless its config says how many. command: in place of `python train.py`.
        """
        with contextlib.ExitStack() as stack:
            try:
                lock = pool.claim(run)
                if lock is None:
                    return Outcome("elsewhere")
                stack.callback(os.close, lock)
                settled = _settled(run, pool)
                if settled is not None:
                    return settled
                job = cls._start(run, pool, lock, threads, gpu, command or (sys.executable, str(TRAIN)))
            except OSError as error:
                outcome = Outcome("failed", f"cannot be started: {error}")
                _note(pool, run, status="failed", message=outcome.message)
                return outcome
            # From here on the lock is the job's.
            stack.pop_all()
            return job

    @classmethod
    def _start(
        cls, run: Run, pool: Pool, lock: int, threads: int | None, gpu: str | None, command: Sequence[str]
    ) -> Self:
        now, attempt = time.time(), pool.read_job(run).get("attempt", 0) + 1
        # Written before the training exists: should this process die in between, the run is lost, not unknown.
        lease: dict[str, Any] = dict(
            status="running",
            attempt=attempt,
            pid=None,
            host=socket.gethostname(),
            slurm_task=slurm_task(),
            started=now,
            heartbeat=now,
            ended=None,
            exit_code=None,
            message="",
        )
        pool.write_job(run, **lease)
        with open(pool.log(run), "ab") as log:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"--- attempt {attempt} on {socket.gethostname()}, {when}\n".encode())
            log.flush()
            log_start = log.tell()
            process = _spawn(run, pool, lock, log.fileno(), threads, gpu, command)
        lease["pid"] = process.pid
        _note(pool, run, **lease)
        return cls(run, pool, process, lock, log_start, lease)

    def poll(self) -> Outcome | None:
        """The outcome of a training that has ended; None, and a heartbeat now and then, while it goes on."""
        if self._outcome is not None:
            return self._outcome
        code = self._process.poll()
        if code is None:
            now = time.time()
            if now - self._beaten >= HEARTBEAT_SECONDS:
                self._beaten = now
                self._beat(now)
            return None
        outcome = self._judge(code)
        # A signal handler that polled in the meantime has concluded already.
        if self._outcome is None:
            self._outcome = outcome
            if outcome.status != "elsewhere":
                status = "pending" if outcome.status == "interrupted" else outcome.status
                ending = dict(status=status, ended=time.time(), exit_code=code, message=outcome.message)
                _note(self.pool, self.run, **{**self._lease, **ending})
            os.close(self._lock)
        return self._outcome

    def _beat(self, now: float) -> None:
        """Renew the lease, or give way to who took the run over because it saw no sign of life from here."""
        if self.pool.read_job(self.run).get("started", self._lease["started"]) != self._lease["started"]:
            # Saving would write into what the other one has begun.
            self.kill()
            self._taken_over = True
            return
        self._lease["heartbeat"] = now
        _note(self.pool, self.run, **self._lease)

    def interrupt(self) -> None:
        """Ask the training to save and stop."""
        if self._outcome is None and self._process.poll() is None:
            self._asked = True
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the training and whatever it has started, without saving."""
        if self._outcome is None and self._process.poll() is None:
            self._killed = True
            os.killpg(self._process.pid, signal.SIGKILL)

    def _judge(self, code: int) -> Outcome:
        if code == DONE and self.pool.is_done(self.run):
            return Outcome("done", exit_code=code)
        if self._taken_over:
            return Outcome("elsewhere", "taken over by another process", code)
        if code == INTERRUPTED or self._killed or (self._asked and code == _TRACEBACK):
            return Outcome("interrupted", _GOES_ON, code)
        if -code in _STOPPED_BY:
            return Outcome("interrupted", f"{self._reason(code)}; {_GOES_ON}", code)
        return Outcome("failed", self._reason(code), code)

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"killed by signal {-code} ({_signal_name(-code)})"
        if code == DIVERGED:
            return "diverged: its run folder holds a post-mortem"
        said = last_lines(self.pool.log(self.run), 1, self._log_start)
        if not self.pool.run_folder(self.run).exists() and not said.startswith("error:"):
            return f"its run folder was removed while it trained (exit status {code})"
        if wrong := self.pool.damage(self.run):
            return wrong
        if code == DONE:
            return "ended without finishing: train.stop_after is set, or its done.json was removed"
        return f"exit status {code}: {said or 'it said nothing'}"


def execute(
    run: Run,
    pool: Pool,
    *,
    threads: int | None = None,
    gpu: str | None = None,
    command: Sequence[str] | None = None,
    on_start: Callable[[Job], None] | None = None,
) -> Outcome:
    """Train one run to its end, as a cluster's job does. `on_start` is given the job, to interrupt it from outside."""
    job = Job.start(run, pool, threads=threads, gpu=gpu, command=command)
    if isinstance(job, Outcome):
        return job
    if on_start is not None:
        on_start(job)
    while (outcome := job.poll()) is None:
        time.sleep(0.5)
    return outcome


def _settled(run: Run, pool: Pool) -> Outcome | None:
    """What other processes have made of the run between a look at its state and the claim."""
    if pool.is_done(run):
        return Outcome("done", settled=True)
    if wrong := pool.damage(run):
        return Outcome("failed", wrong, settled=True)
    if pool.runs_on_another_host(run) or pool.is_trained_by_hand(run):
        return Outcome("elsewhere")
    job = pool.read_job(run)
    return Outcome("failed", str(job.get("message", "")), settled=True) if job.get("status") == "failed" else None


def _note(pool: Pool, run: Run, **changes: Any) -> None:
    """A full disk or a folder that was deleted stops no training; without the note the run counts as lost."""
    with contextlib.suppress(OSError):
        pool.write_job(run, **changes)


def _spawn(
    run: Run, pool: Pool, lock: int, log: int, threads: int | None, gpu: str | None, command: Sequence[str]
) -> subprocess.Popen[bytes]:
    path = pool.job_folder(run) / "config.yaml"
    save_config(run.config, path)
    environment = dict(os.environ)
    overrides = []
    if threads is not None and run.config.train.threads is None:
        overrides.append(f"train.threads={threads}")
        environment |= dict.fromkeys(_THREADS, str(threads))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        # Else CUDA counts the fastest first, and nvidia-smi, whose numbers these are, does not.
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return subprocess.Popen(
        [*command, str(path), *overrides],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        # Ctrl-C reaches the driver alone, which then asks every training to save.
        start_new_session=True,
        pass_fds=(lock,),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unnamed"
