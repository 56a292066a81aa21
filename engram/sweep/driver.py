"""Many runs on one machine: N at a time, each once, whatever dies on the way."""

import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from engram.report.text import duration
from engram.sweep.display import Display
from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.worker import Job, Outcome, last_lines

# Seconds between two looks at the running processes, and at runs that another process trains.
TICK, FOREIGN_TICK = 0.2, 2.0
DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130


def run_all(
    runs: Sequence[Run],
    pool: Pool,
    *,
    jobs: int,
    fail_fast: bool = False,
    command: Sequence[str] | None = None,
    console: Console | None = None,
) -> int:
    """Train every run that is neither done nor failed, and return an exit status: 0, 1 (some failed) or 130.

    A run that another process is training is waited for, and trained here should that process give up. Failed runs of
    earlier calls stay failed (`reset` frees them). Raises SweepError: a finished run is not what its name says.
    """
    for run in runs:
        pool.check_finished(run)
    driver = _Driver(pool, jobs, fail_fast, command, Display(console or Console(stderr=True), runs, pool))
    with driver.display, _signals(driver.interrupt):
        driver.work(runs)
    return driver.conclude()


def reset(runs: Iterable[Run], pool: Pool) -> list[Run]:
    """Free what failed or was lost, and return it."""
    again = [run for run in runs if pool.state(run).status in ("failed", "lost")]
    for run in again:
        pool.write_job(run, status="pending", message="")
    return again


def visible_gpus() -> list[str]:
    """Devices that trainings may be given; asked of the driver's tool, so that torch need not be imported."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 else []


class _Driver:
    def __init__(self, pool: Pool, jobs: int, fail_fast: bool, command: Sequence[str] | None, display: Display) -> None:
        self.pool, self.jobs, self.fail_fast, self.command = pool, jobs, fail_fast, command
        self.display = display
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.gpus = visible_gpus()
        # By slot, which decides the GPU.
        self.running: dict[int, Job] = {}
        self.foreign: list[Run] = []
        self.failed: list[tuple[Run, str]] = []
        self.failed_now = False
        # Requests to stop, and how many of them each slot's training has been sent.
        self.interrupts = 0
        self._sent: dict[int, int] = {}
        self._next_look = 0.0

    def work(self, runs: Sequence[Run]) -> None:
        waiting: deque[Run] = deque()
        for run in runs:
            state = self.pool.state(run)
            if state.status == "failed":
                self.failed.append((run, f"failed before: {state.message}"))
            elif state.status != "done":
                waiting.append(run)
        while self.running or ((waiting or self.foreign) and not self._closed):
            self._fill(waiting)
            self._pass_on_interrupts()
            self._poll()
            self._look_at_foreign(waiting)
            self.display.update([job.run for job in self.running.values()], self.foreign)
            time.sleep(TICK)

    @property
    def _closed(self) -> bool:
        """Nothing more is started."""
        return self.interrupts > 0 or (self.fail_fast and self.failed_now)

    def interrupt(self) -> None:
        """Called by a signal, wherever the driver is: the loop passes it on."""
        self.interrupts += 1

    def _pass_on_interrupts(self) -> None:
        for slot, job in self.running.items():
            if self._sent[slot] < self.interrupts:
                self._sent[slot] = self.interrupts
                job.interrupt()
                self.display.say(f"{job.run.id} ({job.run.label}): interrupted, saving")

    def conclude(self) -> int:
        """Say what failed, and how to go on."""
        for run, message in self.failed:
            self.display.say(f"\nfailed: {run.id} ({run.part}, {run.label}): {message}")
            log = self.pool.log(run)
            if log.exists():
                self.display.say("  " + last_lines(log, 5).replace("\n", "\n  ") + f"\n  all of it: {log}")
        if self.failed:
            self.display.say("`retry --failed` trains them once more, from their last checkpoints")
        if self.interrupts:
            return INTERRUPTED
        return SOME_FAILED if self.failed else DONE

    def _fill(self, waiting: deque[Run]) -> None:
        free = [slot for slot in range(self.jobs) if slot not in self.running]
        while waiting and free and not self._closed:
            run = waiting.popleft()
            gpu = self.gpus[free[0] % len(self.gpus)] if self.gpus else None
            job = Job.start(run, self.pool, threads=self.threads, gpu=gpu, command=self.command)
            if isinstance(job, Job):
                slot = free.pop(0)
                self.running[slot], self._sent[slot] = job, 0
                self.display.started(run)
            elif job.status == "elsewhere":
                self.foreign.append(run)
                self.display.say(f"{run.id} ({run.label}): another process is training it; waiting for it")

    def _poll(self) -> None:
        for slot, job in list(self.running.items()):
            outcome = job.poll()
            if outcome is not None:
                del self.running[slot]
                self._ended(job.run, outcome, time.time() - job.started)

    def _ended(self, run: Run, outcome: Outcome, seconds: float) -> None:
        if outcome.status == "failed":
            self.failed.append((run, outcome.message))
            self.failed_now = True
        self.display.ended(run, outcome, duration(seconds))

    def _look_at_foreign(self, waiting: deque[Run]) -> None:
        if not self.foreign or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + FOREIGN_TICK
        for run in list(self.foreign):
            state = self.pool.state(run)
            if state.status == "running":
                continue
            self.foreign.remove(run)
            if state.status == "done":
                self.display.ended(run, Outcome("done"), "elsewhere")
            elif state.status == "failed":
                self._ended(run, Outcome("failed", state.message), 0)
            else:
                waiting.append(run)


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
