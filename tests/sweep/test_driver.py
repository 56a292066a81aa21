"""Many runs, each once: failures, signals, kills, and two drivers at the same time."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from engram.sweep.driver import reset, run_all
from engram.sweep.grid import Run, expand, unique
from engram.sweep.pool import Pool
from engram.sweep.spec import SweepError, load_sweep
from tests.sweep.build import write_sweep
from tests.sweep.drive import FAKE

ROOT = Path(__file__).parents[2]


def build(folder: Path, *prompts: str, seeds: int = 1) -> tuple[Path, list[Run], Pool]:
    """A sweep whose run number i does what prompts[i] says."""
    kinds = {f"run{i}": {"eval.prompt": prompt, "optim.lr": (i + 1) / 100} for i, prompt in enumerate(prompts)}
    path = write_sweep(folder, axes={"kind": kinds}, seeds=list(range(seeds)))
    sweep = load_sweep(path)
    return path, unique(expand(sweep)), Pool(sweep.pool, sweep.out)


def drive(runs: list[Run], pool: Pool, *, jobs: int = 2, fail_fast: bool = False) -> tuple[int, str]:
    """Exit status, and what a log file would hold."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    return run_all(runs, pool, jobs=jobs, fail_fast=fail_fast, command=FAKE, console=console), text.getvalue()


def ledger(pool: Pool, word: str) -> list[str]:
    """Ids of the runs whose trainer noted `word`, in order."""
    lines = (pool.pool / "ledger").read_text().splitlines() if (pool.pool / "ledger").exists() else []
    return [line.split()[0] for line in lines if line.split()[1] == word]


def statuses(runs: list[Run], pool: Pool) -> list[str]:
    return [pool.state(run).status for run in runs]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def start_driver(path: Path, jobs: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sweep.drive", str(path), str(jobs)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_run_is_trained_once_and_then_left_alone(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0.1", "sleep 0.1", seeds=2)
    code, text = drive(runs, pool)
    assert code == 0 and statuses(runs, pool) == ["done"] * 4
    assert sorted(ledger(pool, "start")) == sorted(run.id for run in runs)
    assert "[4/4]" in text and "validation loss 4.0100" in text
    code, text = drive(runs, pool)
    assert code == 0 and "all 4 runs are done: nothing to do" in text and len(ledger(pool, "start")) == 4


def test_a_copy_of_a_finished_run_counts_as_done(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0")
    folder = pool.out / "runs" / runs[0].id
    folder.mkdir(parents=True)
    (folder / "done.json").write_text('{"step": 10, "val_loss": 3.5}')
    code, _ = drive(runs, pool)
    assert code == 0 and ledger(pool, "start") == [] and pool.state(runs[0]).val_loss == 3.5


def test_cores_are_divided(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0")
    drive(runs, pool, jobs=1)
    cores = len(os.sched_getaffinity(0))
    assert (pool.pool / "ledger").read_text().splitlines()[0] == f"{runs[0].id} start train.threads={cores} OMP={cores}"


def test_a_failure_stops_neither_the_others_nor_hides(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "fail", "sleep 0.1", "diverge", "stop", "sleep 0")
    code, text = drive(runs, pool)
    assert code == 1 and statuses(runs, pool) == ["failed", "done", "failed", "failed", "done"]
    assert "exit status 2: error: it was told to fail" in text and "diverged" in text and "ended without" in text
    assert str(pool.log(runs[0])) in text and "retry --failed" in text
    # A later call leaves them as they are, and still says so.
    code, text = drive(runs, pool)
    assert code == 1 and "failed before" in text and len(ledger(pool, "start")) == 5


def test_fail_fast_starts_nothing_more(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "fail", "sleep 0", "sleep 0")
    assert drive(runs, pool, jobs=1, fail_fast=True)[0] == 1
    assert statuses(runs, pool) == ["failed", "pending", "pending"]


def test_retry_trains_what_failed_once_more(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "fail", "sleep 0")
    drive(runs, pool)
    assert [run.id for run in reset(runs, pool)] == [runs[0].id]
    assert statuses(runs, pool) == ["pending", "done"]
    # The cause has been put right.
    path.write_text(path.read_text().replace("prompt: fail", "prompt: sleep 0"))
    again = unique(expand(load_sweep(path)))
    assert again[0].id == runs[0].id and drive(again, pool)[0] == 0
    assert pool.state(again[0]).attempt == 2 and reset(again, pool) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_trainings_save_and_the_next_call_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    path, runs, pool = build(tmp_path, "sleep 60", "sleep 60", "sleep 0")
    driver = start_driver(path)
    wait_until(lambda: sum((pool.run_folder(run) / "metrics.jsonl").exists() for run in runs) == 2)
    driver.send_signal(number)
    _, text = driver.communicate(timeout=30)
    assert driver.returncode == 130, text
    assert sorted(ledger(pool, "saved")) == sorted(ledger(pool, "start")) and len(ledger(pool, "saved")) == 2
    assert statuses(runs, pool) == ["pending"] * 3
    path.write_text(path.read_text().replace("sleep 60", "sleep 0"))
    assert drive(unique(expand(load_sweep(path))), pool)[0] == 0


def test_a_killed_driver_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 3", "sleep 3", "sleep 0.1", "sleep 0.1")
    driver = start_driver(path)
    wait_until(lambda: len(ledger(pool, "start")) == 2)
    driver.kill()
    driver.communicate(timeout=30)
    # Its trainings go on, and hold their locks.
    assert statuses(runs, pool) == ["running", "running", "pending", "pending"]
    code, text = drive(runs, pool)
    assert code == 0 and "another process is training it" in text
    assert sorted(ledger(pool, "start")) == sorted(ledger(pool, "end")) == sorted(run.id for run in runs)


def test_a_killed_training_is_a_failure_of_its_own(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 60", "sleep 0.1")
    driver = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0 and pool.state(runs[1]).status == "done")
    os.kill(pool.read_job(runs[0])["pid"], signal.SIGKILL)
    _, text = driver.communicate(timeout=30)
    assert driver.returncode == 1 and "killed by signal 9 (SIGKILL)" in text
    assert statuses(runs, pool) == ["failed", "done"]


def test_a_training_that_dies_after_its_driver_is_lost_and_trained_again(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 60")
    driver = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    driver.kill()
    driver.communicate(timeout=30)
    os.kill(pool.read_job(runs[0])["pid"], signal.SIGKILL)
    wait_until(lambda: statuses(runs, pool) == ["lost"])
    path.write_text(path.read_text().replace("sleep 60", "sleep 0"))
    assert drive(unique(expand(load_sweep(path))), pool)[0] == 0


def test_two_drivers_share_the_work(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, *["sleep 0.5"] * 6)
    drivers = [start_driver(path), start_driver(path)]
    texts = [driver.communicate(timeout=60)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], texts
    assert sorted(ledger(pool, "start")) == sorted(run.id for run in runs)
    assert any("another process is training it" in text for text in texts)


def test_a_run_folder_that_vanishes_is_reported(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 2", "sleep 0")
    driver = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    shutil.rmtree(pool.run_folder(runs[0]))
    shutil.rmtree(pool.job_folder(runs[0]))
    _, text = driver.communicate(timeout=30)
    assert driver.returncode == 1 and statuses(runs, pool) == ["failed", "done"]
    assert f"failed: {runs[0].id}" in text and "exit status 1: FileNotFoundError" in text


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    drive(runs, pool)
    shutil.copy(pool.run_folder(runs[1]) / "config.yaml", pool.run_folder(runs[0]))
    with pytest.raises(SweepError, match=f"holds run {runs[1].id}, but its name says {runs[0].id}"):
        drive(runs, pool)
