"""The runs of a sweep as one job array, through submitit (extra `slurm`)."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram.config import load_config, save_config
from engram.config_identity import run_id
from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.spec import SlurmConfig, SweepError
from engram.sweep.worker import Job, execute


class Training:
    """One array task. Pickled as a name and plain paths, so that what it does is the code at the time it starts."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._queued_again = False

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
        if self._job is not None:
            self._job.interrupt()


def submit(runs: Sequence[Run], pool: Pool, slurm: SlurmConfig, *, cluster: str, dry_run: bool = False) -> list[str]:
    """Submit what is pending or lost as an array; returns the jobs' ids, or lines that say what would be submitted.

    Raises SweepError: submitit is not installed, or there is no Slurm here.
    """
    for run in runs:
        pool.check(run)
    waiting = [run for run in runs if pool.state(run).status in ("pending", "lost")]
    parameters = _parameters(slurm, cluster)
    if dry_run:
        settings = ", ".join(f"{name}={value}" for name, value in parameters.items())
        return [f"{len(waiting)} runs to {cluster} with {settings}", *(f"{run.id}  {run.label}" for run in waiting)]
    if not waiting:
        return []
    pool.prepare()
    executor = _executor(pool, slurm, cluster)
    executor.update_parameters(**parameters)
    ready = [run for run in waiting if _make_ready(run, pool, cluster)]
    columns = zip(*(_arguments(run, pool, slurm.cpus_per_task) for run in ready), strict=True)
    return [job.job_id for job in executor.map_array(Training(), *columns)] if ready else []


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
        "name": "engram-sweep",
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
