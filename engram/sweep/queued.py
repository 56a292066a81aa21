"""Which runs wait in a cluster's queue: as `submit` wrote it down, and as the queue tells now."""

import json
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.spec import SweepError
from engram.sweep.tail import read_object

# Of every job of a sweep, by which the queue finds them.
JOB_NAME = "engram-sweep"


def note_queued(run: Run, pool: Pool, cluster: str, job: str) -> None:
    """Remember which job of which cluster (`slurm`, or `local` on this machine) is to train the run."""
    entry = {"cluster": cluster, "job": job, "host": socket.gethostname()}
    _path(run, pool).write_text(json.dumps(entry) + "\n")


def forget_queued(run: Run, pool: Pool) -> None:
    _path(run, pool).unlink(missing_ok=True)


def living_jobs(runs: Iterable[Run], pool: Pool) -> dict[str, str]:
    """Run id -> the job that is to train it, of runs that are not done and whose job still waits or runs.

    Raises SweepError: the queue cannot be asked from here.
    """
    found = {
        run.id: read_object(_path(run, pool)) for run in runs if _path(run, pool).exists() and not pool.is_done(run)
    }
    of_slurm = [str(entry["job"]) for entry in found.values() if entry.get("cluster") == "slurm"]
    living = _slurm_jobs(of_slurm) if of_slurm else set()
    return {
        name: str(entry["job"])
        for name, entry in found.items()
        if (entry["job"] in living if entry.get("cluster") == "slurm" else _lives_here(entry))
    }


def _path(run: Run, pool: Pool) -> Path:
    return pool.job_folder(run) / "queued.json"


def _slurm_jobs(wanted: list[str]) -> set[str]:
    command = ["squeue", "--noheader", "--array", f"--name={JOB_NAME}", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    except (OSError, subprocess.SubprocessError) as error:
        raise SweepError(
            f"jobs {', '.join(wanted)} were submitted for runs of this sweep, but squeue cannot say whether they still "
            f"wait ({error}): call this where squeue works, or give --again to ignore them"
        ) from None


def _lives_here(entry: dict[str, Any]) -> bool:
    """A local job is the process of submitit that watches over the training; its number may be another's by now."""
    try:
        command = Path(f"/proc/{entry.get('job')}/cmdline").read_bytes()
    except OSError:
        return False
    return entry.get("host") == socket.gethostname() and b"submitit" in command
