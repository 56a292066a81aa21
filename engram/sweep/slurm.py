"""The runs of a sweep as one job array, through submitit (extra `slurm`)."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.config import load_config, save_config
from engram.config_identity import run_id
from engram.report.text import counted
from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.queued import JOB_NAME, living_jobs, note_queued
from engram.sweep.spec import SlurmConfig, SweepError
from engram.sweep.worker import Job, execute


class Training:
    """One array task. Pickled as a name and plain paths, so that what it does is the code at the time it starts."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._stopping = self._queued_again = False

    def __call__(self, config: str, part: str, point: str, pool: str, out: str, threads: int) -> str:
        """Train the run of a config file; returns how it ended. Raises RuntimeError where it failed."""
        settings = load_config(config)
        run = Run(run_id(settings), part, json.loads(point), settings.seed, settings)
        # A task may see fewer cores than it was promised, and training refuses more threads than cores.
        threads = min(threads, len(os.sched_getaffinity(0)))
        # What a cluster sends to a job that is cancelled.
        before = signal.signal(signal.SIGTERM, lambda number, frame: self._interrupt())
        try:
            outcome = execute(run, Pool(Path(pool), Path(out)), threads=threads, on_start=self._remember)
        finally:
            signal.signal(signal.SIGTERM, before)
        if outcome.status == "interrupted" and not self._queued_again:
            # A task that returned would count as complete, and never be queued again.
            raise RuntimeError(f"{run.id} ({run.label}): stopped by a signal; its state is saved, submit it again")
        if outcome.status == "failed":
            raise RuntimeError(f"{run.id} ({run.label}): {outcome.message}")
        return outcome.status

    def checkpoint(self, *arguments: Any) -> Any:
        """Called before a preemption or the end of the time limit: save, and queue the rest."""
        import submitit

        self._queued_again = True
        self._interrupt()
        while self._job is not None and self._job.poll() is None:
            time.sleep(0.5)
        return submitit.helpers.DelayedSubmission(Training(), *arguments)

    def _remember(self, job: Job) -> None:
        self._job = job

    def _interrupt(self) -> None:
        # A cluster sends several signals before it ends a task; a second one would stop the training at once, unsaved.
        if self._job is not None and not self._stopping:
            self._stopping = True
            self._job.interrupt()


@dataclass(frozen=True)
class Submission:
    """What was submitted, with the job of each run, or would be (None); what waits in the queue already; what is
    damaged, with the reason.
    """

    cluster: str
    settings: dict[str, Any]
    logs: Path
    jobs: list[tuple[Run, str | None]]
    queued: list[tuple[Run, str]]
    damaged: list[tuple[Run, str]]

    def lines(self) -> list[str]:
        """What to tell whoever submits, and what they do next."""
        said = [f"damaged: {run.id} ({run.label}): {wrong}" for run, wrong in self.damaged]
        said += [f"queued already as job {job}: {run.id} ({run.label})" for run, job in self.queued]
        if not self.jobs:
            return [*said, f"no {'other ' if said else ''}run is pending or lost: nothing to submit"]
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        said += [f"{job or 'would submit'}  {run.id}  {run.label}" for run, job in self.jobs]
        said.append(f"{counted(len(self.jobs), 'run')} to {self.cluster} with {settings}")
        if all(job for _, job in self.jobs):
            said.append(f"logs: {self.logs}/jobs/RUN/log.txt of the trainings, {self.logs}/slurm/JOB_* of their tasks")
            said.append("next: `status SWEEP.yaml --watch`; what fails waits for `retry`, then `collect`")
        return said


def submit(
    runs: Sequence[Run], pool: Pool, slurm: SlurmConfig, *, cluster: str, dry_run: bool = False, again: bool = False
) -> Submission:
    """Submit what is pending or lost as an array, but for what waits in the queue already (`again`: that too).

    Raises SweepError: submitit is not installed, there is no Slurm here, or its queue cannot be asked.
    """
    damaged = [(run, wrong) for run in runs if (wrong := pool.check(run))]
    living = {} if again else living_jobs(runs, pool)
    barred = {run.id for run, _ in damaged}
    waiting = [run for run in runs if run.id not in barred and pool.state(run).status in ("pending", "lost")]
    queued = [(run, living[run.id]) for run in waiting if run.id in living]
    waiting = [run for run in waiting if run.id not in living]
    parameters = _parameters(slurm, cluster)
    jobs: list[tuple[Run, str | None]] = [(run, None) for run in waiting]
    if waiting and not dry_run:
        pool.prepare()
        executor = _executor(pool, slurm, cluster)
        executor.update_parameters(**parameters)
        ready = [run for run in waiting if _make_ready(run, pool, cluster)]
        columns = zip(*(_arguments(run, pool, slurm.cpus_per_task) for run in ready), strict=True)
        started = executor.map_array(Training(), *columns) if ready else []
        jobs = [(run, str(job.job_id)) for run, job in zip(ready, started, strict=True)]
        for run, job in jobs:
            note_queued(run, pool, cluster, str(job))
    return Submission(cluster, parameters, pool.pool, jobs, queued, damaged)


def _make_ready(run: Run, pool: Pool, cluster: str) -> bool:
    """Write down what the task will read; False where a driver has taken the run by now."""
    with pool.held(run) as mine:
        if mine:
            save_config(run.config, pool.job_folder(run) / "config.yaml")
            pool.write_job(run, status="pending", message=f"submitted to {cluster}")
        return mine


def _arguments(run: Run, pool: Pool, threads: int) -> tuple[str, str, str, str, str, int]:
    config, point = pool.job_folder(run) / "config.yaml", json.dumps(run.point)
    return str(config.absolute()), run.part, point, str(pool.pool.absolute()), str(pool.out.absolute()), threads


def _executor(pool: Pool, slurm: SlurmConfig, cluster: str) -> Any:
    try:
        import submitit
    except ImportError:
        raise SweepError("submit needs the package submitit: pip install 'engram[slurm]'") from None
    try:
        return submitit.AutoExecutor(
            folder=pool.pool / "slurm", cluster=cluster, slurm_max_num_timeout=slurm.max_requeues
        )
    except RuntimeError as error:
        raise SweepError(f"--cluster {cluster}: {error}; `run` trains on this machine") from None


def _parameters(slurm: SlurmConfig, cluster: str) -> dict[str, Any]:
    """In submitit's words, what is not set left out."""
    common = {
        "name": JOB_NAME,
        "timeout_min": slurm.time_minutes,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node,
        "mem_gb": slurm.mem_gb,
    }
    own = {
        "slurm_partition": slurm.partition,
        "slurm_account": slurm.account,
        "slurm_array_parallelism": slurm.array_parallelism,
        "slurm_setup": list(slurm.setup) or None,
        "slurm_additional_parameters": slurm.additional or None,
    }
    found = common | (own if cluster == "slurm" else {})
    return {name: value for name, value in found.items() if value is not None}
