"""Sweeps of a trainer that does what it is told, and a driver in a process of its own, which tests may kill:

python -m tests.sweep.drive SWEEP JOBS
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from engram.config import save_config
from engram.sweep.driver import run_all
from engram.sweep.grid import Run, expand, unique
from engram.sweep.pool import Pool
from engram.sweep.spec import load_sweep
from tests.sweep.build import write_sweep

ROOT = Path(__file__).parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_train.py")))


def build(folder: Path, *prompts: str, seeds: int = 1) -> tuple[Path, list[Run], Pool]:
    """A sweep whose run number i does what prompts[i] says."""
    kinds = {f"run{i}": {"eval.prompt": prompt, "optim.lr": (i + 1) / 100} for i, prompt in enumerate(prompts)}
    path = write_sweep(folder, axes={"kind": kinds}, seeds=list(range(seeds)))
    return path, *load(path)


def load(path: Path) -> tuple[list[Run], Pool]:
    sweep = load_sweep(path)
    return unique(expand(sweep)), Pool(sweep.pool, sweep.out)


def ledger(pool: Pool, word: str) -> list[str]:
    """Ids of the runs whose trainer noted `word`, in order."""
    lines = (pool.pool / "ledger").read_text().splitlines() if (pool.pool / "ledger").exists() else []
    return [line.split()[0] for line in lines if line.split()[1] == word]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def drive(runs: list[Run], pool: Pool, *, jobs: int = 2, **settings: Any) -> tuple[int, str]:
    """Exit status, and what a log file would hold."""
    text = io.StringIO()
    settings = {"command": FAKE, "console": Console(file=text, width=200), **settings}
    return run_all(runs, pool, jobs=jobs, **settings), text.getvalue()


def finish(folder: Path, run: Run, steps: int = 10, val_loss: float = 3.5) -> None:
    """What a finished run leaves, in its shortest form."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(run.config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 3.0, "tokens_per_second": 320.0}) + "\n")
    (folder / "done.json").write_text(json.dumps({"step": steps, "val_loss": val_loss}))


def abandon(pool: Pool, run: Run, **lease: Any) -> None:
    """A run that another host was training, long ago."""
    pool.write_job(run, **{"status": "running", "host": "elsewhere", "heartbeat": 0, **lease})
    for path in (pool.job_folder(run) / "state.json", pool.run_folder(run) / "metrics.jsonl"):
        if path.exists():
            os.utime(path, (0, 0))


def statuses(runs: list[Run], pool: Pool) -> list[str]:
    return [pool.state(run).status for run in runs]


def ids(runs: list[Run]) -> list[str]:
    return sorted(run.id for run in runs)


def mend(path: Path, fault: str) -> list[Run]:
    """The runs with the same ids, now that the cause of a failure is gone."""
    path.write_text(path.read_text().replace(f"prompt: {fault}", "prompt: sleep 0"))
    return load(path)[0]


def start_driver(path: Path, jobs: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sweep.drive", str(path), str(jobs)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def text_of(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=60)[1]


if __name__ == "__main__":
    runs, pool = load(Path(sys.argv[1]))
    sys.exit(run_all(runs, pool, jobs=int(sys.argv[2]), command=FAKE))
