"""Many runs on one machine: N at a time, each once, whatever dies on the way."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from engram.report.text import counted
from engram.sweep.display import Display
from engram.sweep.grid import Run, unique
from engram.sweep.pool import Pool
from engram.sweep.queued import forget_queued, living_jobs
from engram.sweep.worker import DIVERGED, Job, Outcome

# Seconds between two looks at the running processes, and at runs that another process trains.
TICK, FOREIGN_TICK = 0.2, 2.0
DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
# Requests to stop after which trainings are killed: the first lets them save, the second ends them at once, but one
# that hangs hears neither.
_PATIENCE = 3
# A device or a disk that is broken fails one run after another, at once: so many failures in a row, each within so many
# seconds of its start, and nothing more is started in that place.
BROKEN_AFTER, SOON = 3, 60.0


def run_all(
    runs: Sequence[Run],
    pool: Pool,
    *,
    jobs: int,
    fail_fast: bool = False,
    again: bool = False,
    command: Sequence[str] | None = None,
    console: Console | None = None,
) -> int:
    """Train every run that is neither done nor failed; returns an exit status: 0 all done, 1 some are not, or 130.

    A run that another process is training is waited for, and trained here should that process give up. Left alone:
    failed runs of earlier calls (`reset` frees them), damaged ones, and (but for `again`) those that wait in a
    cluster's queue. Raises SweepError: the pool cannot be written.
    """
    runs = unique(list(runs))
    pool.prepare()
    damaged = {run.id: wrong for run in runs if (wrong := pool.check(run))}
    sound = [run for run in runs if run.id not in damaged]
    queued = {} if again else living_jobs(sound, pool)
    display = Display(console or Console(stderr=True), sound, pool)
    driver = _Driver(sound, pool, jobs, fail_fast, command, display, queued)
    with driver.display, _signals(driver.interrupt):
        driver.work()
    code = driver.conclude()
    for run in runs:
        if run.id in damaged:
            display.say(f"damaged: {run.id} ({run.part}, {run.label}): {damaged[run.id]}")
    return code or (SOME_FAILED if damaged else DONE)


def reset(runs: Iterable[Run], pool: Pool, *, diverged: bool = False) -> tuple[list[Run], list[Run]]:
    """Free what failed or was lost; returns that, and what diverged, which is freed only where `diverged` says so."""
    again, left = [], []
    for run in runs:
        if pool.state(run).status not in ("failed", "lost"):
            continue
        if not diverged and pool.read_job(run).get("exit_code") == DIVERGED:
            left.append(run)
            continue
        with pool.held(run) as mine:
            if mine:
                pool.write_job(run, status="pending", exit_code=None, message="")
                # Its job has ended with it.
                forget_queued(run, pool)
                again.append(run)
    return again, left


def visible_gpus() -> list[str]:
    """Devices that trainings may be given; asked of the driver's tool, so that torch need not be imported."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


class _Driver:
    def __init__(
        self,
        runs: Sequence[Run],
        pool: Pool,
        jobs: int,
        fail_fast: bool,
        command: Sequence[str] | None,
        display: Display,
        queued: Mapping[str, str],
    ) -> None:
        self.runs, self.pool, self.fail_fast, self.command = runs, pool, fail_fast, command
        self.display = display
        self.waiting: deque[Run] = deque()
        # By slot, which decides the GPU.
        self.running: dict[int, Job] = {}
        self.foreign: list[Run] = []
        self.failed: list[tuple[Run, str]] = []
        self.failed_now = False
        self._sort(queued)
        self.jobs = max(1, min(jobs, len(self.waiting)))
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        self.gpus = visible_gpus()
        # Failures in a row of each slot, soon after their starts; and the slots in which nothing more is started.
        self._broken: Counter[int] = Counter()
        self._closed_slots: set[int] = set()
        # Requests to stop, and how many of them each slot's training has been sent.
        self.interrupts = 0
        self._sent: dict[int, int] = {}
        self._announced: set[str] = set()
        self._next_look = 0.0

    def _sort(self, queued: Mapping[str, str]) -> None:
        left = []
        for run in self.runs:
            state = self.pool.state(run)
            if state.status == "failed":
                self.failed.append((run, f"failed before: {state.message}"))
            elif run.id in queued and state.status in ("pending", "lost"):
                left.append(queued[run.id])
            elif state.status != "done":
                self.waiting.append(run)
        if left:
            self.display.say(
                f"{counted(len(left), 'run')} left to the queue that `submit` put them in (jobs {', '.join(left)}): "
                "cancel those jobs, or give --again, to train them here"
            )

    def work(self) -> None:
        while self.running or ((self.waiting or self.foreign) and not self._closed):
            self._fill()
            self._pass_on_interrupts()
            self._poll()
            self._look_at_foreign()
            self.display.update([job.run for job in self.running.values()], self.foreign)
            time.sleep(TICK)

    @property
    def _closed(self) -> bool:
        """Nothing more is started."""
        return self.interrupts > 0 or (self.fail_fast and self.failed_now) or len(self._closed_slots) == self.jobs

    def interrupt(self) -> None:
        """Called by a signal, wherever the driver is: the loop passes it on."""
        self.interrupts += 1

    def _pass_on_interrupts(self) -> None:
        for slot, job in self.running.items():
            if self._sent[slot] < self.interrupts:
                self._sent[slot] = self.interrupts
                if self.interrupts < _PATIENCE:
                    job.interrupt()
                else:
                    job.kill()
                words = ["saving", "stopping at once", "killed"][min(self.interrupts, _PATIENCE) - 1]
                self.display.say(f"{job.run.id} ({job.run.label}): interrupted, {words}")

    def conclude(self) -> int:
        """Say how it went, what failed, and how to go on."""
        done = sum(self.pool.is_done(run) for run in self.runs)
        if self.waiting and len(self._closed_slots) == self.jobs:
            self.display.say(
                f"stopped, as every place for a training has failed {BROKEN_AFTER} times in a row; not tried: "
                f"{counted(len(self.waiting), 'run')}. See to the machine (disk, memory, GPUs), then `retry` trains "
                "the failed ones and `run` the rest"
            )
        # Another driver may have retried one with success.
        self.display.conclude(done, [(run, message) for run, message in self.failed if not self.pool.is_done(run)])
        if self.interrupts:
            return INTERRUPTED
        return DONE if done == len(self.runs) else SOME_FAILED

    def _fill(self) -> None:
        free = [slot for slot in range(self.jobs) if slot not in self.running and slot not in self._closed_slots]
        while self.waiting and free and not self._closed:
            run = self.waiting.popleft()
            job = Job.start(run, self.pool, threads=self.threads, gpu=self._gpu(free[0]), command=self.command)
            if isinstance(job, Job):
                slot = free.pop(0)
                self.running[slot], self._sent[slot] = job, 0
                self.display.started(run)
            elif job.status == "elsewhere":
                self.foreign.append(run)
                self._announce(run)
            else:
                self._ended(run, job, None)
                if not job.settled and self._closes(free[0], job, 0.0):
                    free.pop(0)

    def _gpu(self, slot: int) -> str | None:
        return self.gpus[slot % len(self.gpus)] if self.gpus else None

    def _closes(self, slot: int, outcome: Outcome, seconds: float) -> bool:
        """Count the slot's failures, and say whether this one was its last. Divergence is no fault of the machine."""
        if outcome.status != "failed" or outcome.exit_code == DIVERGED or seconds > SOON:
            del self._broken[slot]
            return False
        self._broken[slot] += 1
        if self._broken[slot] < BROKEN_AFTER:
            return False
        self._closed_slots.add(slot)
        gpu = self._gpu(slot)
        self.display.say(
            f"place {slot + 1} of {self.jobs}{'' if gpu is None else f' (GPU {gpu})'}: {BROKEN_AFTER} trainings in a "
            f"row failed within {SOON:.0f} seconds: nothing more is started there"
        )
        return True

    def _announce(self, run: Run) -> None:
        if run.id not in self._announced:
            self._announced.add(run.id)
            self.display.say(f"{run.id} ({run.label}): another process is training it; waiting for it")

    def _poll(self) -> None:
        for slot, job in list(self.running.items()):
            outcome = job.poll()
            if outcome is not None:
                del self.running[slot]
                seconds = time.time() - job.started
                self._ended(job.run, outcome, seconds)
                self._closes(slot, outcome, seconds)
                if outcome.status == "elsewhere":
                    self.foreign.append(job.run)

    def _ended(self, run: Run, outcome: Outcome, seconds: float | None) -> None:
        """`seconds`: that it took here, None where it was trained elsewhere or never began."""
        if outcome.status == "failed":
            self.failed.append((run, outcome.message))
            self.failed_now = True
        self.display.ended(run, outcome, seconds)

    def _look_at_foreign(self) -> None:
        if not self.foreign or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + FOREIGN_TICK
        for run in list(self.foreign):
            state = self.pool.state(run)
            if state.status == "running":
                continue
            self.foreign.remove(run)
            if state.status == "done":
                self._ended(run, Outcome("done"), None)
            elif state.status == "failed":
                self._ended(run, Outcome("failed", state.message), None)
            else:
                self.waiting.append(run)


@contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `interrupt` while the block lasts."""

    def handle(number: int, frame: FrameType | None) -> None:
        interrupt()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
