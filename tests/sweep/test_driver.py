"""Many runs, each once: failures, signals, kills, and two drivers at the same time."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engram.sweep import driver
from engram.sweep.driver import reset, run_all, visible_gpus
from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.spec import SweepError
from engram.sweep.worker import Job
from tests.sweep.drive import FAKE, build, ledger, load, wait_until

ROOT = Path(__file__).parents[2]


def drive(runs: list[Run], pool: Pool, *, jobs: int = 2, **settings: Any) -> tuple[int, str]:
    """Exit status, and what a log file would hold."""
    text = io.StringIO()
    settings = {"command": FAKE, "console": Console(file=text, width=200), **settings}
    return run_all(runs, pool, jobs=jobs, **settings), text.getvalue()


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


def test_every_run_is_trained_once_and_then_left_alone(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0.1", "sleep 0.1", seeds=2)
    code, text = drive(runs, pool)
    assert code == 0 and statuses(runs, pool) == ["done"] * 4
    assert sorted(ledger(pool, "start")) == ids(runs)
    lines = text.splitlines()
    assert f"{runs[0].id} (kind=run0 seed=0): started" in lines
    assert f"[4/4] {runs[3].id} (kind=run1 seed=1): done, validation loss 4.0100, 0:00:0" in text
    assert lines[-1].startswith("4 runs: 4 done; 0:00:0")
    code, text = drive(runs, pool)
    assert code == 0 and "all 4 runs are done: nothing to do" in text and len(ledger(pool, "start")) == 4


def test_a_run_that_is_asked_for_twice(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0.1")
    code, text = drive([*runs, *runs], pool)
    assert code == 0 and len(ledger(pool, "start")) == 1 and "[1/1]" in text and "another" not in text


def test_a_copy_of_a_finished_run_counts_as_done(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0")
    drive(runs, pool)
    shutil.move(pool.run_folder(runs[0]), pool.out / "runs" / runs[0].id)
    code, _ = drive(runs, pool)
    assert code == 0 and len(ledger(pool, "start")) == 1 and pool.state(runs[0]).val_loss == 4.0


@pytest.mark.parametrize(("jobs", "runs_at_once"), [(1, 1), (2, 2), (64, 2)])
def test_cores_and_devices_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, runs_at_once: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    _, runs, pool = build(tmp_path, "sleep 0.5", "sleep 0.5")
    assert drive(runs, pool, jobs=jobs)[0] == 0
    lines = [line.split() for line in (pool.pool / "ledger").read_text().splitlines() if " start " in line]
    threads = 12 // runs_at_once
    assert all(line[2:4] == [f"train.threads={threads}", f"OMP_NUM_THREADS={threads}"] for line in lines)
    devices = {line[4] for line in lines}
    assert devices == {f"CUDA_VISIBLE_DEVICES={device}" for device in "35"[:runs_at_once]}


@pytest.mark.parametrize(
    ("script", "found"),
    [("printf '0\\n1\\n'", ["0", "1"]), ("echo no driver; exit 9", []), (None, [])],
)
def test_devices_are_asked_of_their_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, found: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_failure_stops_neither_the_others_nor_hides(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "fail", "sleep 0.1", "diverge", "stop", "sleep 0")
    code, text = drive(runs, pool)
    assert code == 1 and statuses(runs, pool) == ["failed", "done", "failed", "failed", "done"]
    summary = text[text.index("failed: ") :]
    assert f"failed: {runs[0].id} (main, kind=run0 seed=0): exit status 2: error: it was told to fail\n" in text
    assert "\n  the fake trainer speaks\n  error: it was told to fail\n  all of it: " in summary
    assert "diverged" in summary and "ended without" in summary and str(pool.log(runs[0])) in summary
    assert "5 runs: 2 done, 3 failed; " in summary and "python -m engram.sweep retry" in summary
    # A later call leaves them as they are, and still says so.
    code, text = drive(runs, pool)
    assert code == 1 and "failed before: exit status 2" in text and len(ledger(pool, "start")) == 5


def test_fail_fast_starts_nothing_more(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "fail", "sleep 0", "sleep 0")
    code, text = drive(runs, pool, jobs=1, fail_fast=True)
    assert code == 1 and "3 runs: 0 done, 1 failed, 2 to go" in text
    assert statuses(runs, pool) == ["failed", "pending", "pending"]


def test_a_trainer_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    code, text = drive(runs, pool, command=["/no/such/program"])
    assert code == 1 and statuses(runs, pool) == ["failed"] * 2 and text.count(": failed, cannot be started") == 2


def test_retry_trains_what_failed_or_was_lost_once_more(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "fail", "sleep 0", "sleep 0", "fail")
    drive(runs[:2], pool)
    pool.write_job(runs[2], status="running", host="elsewhere", heartbeat=0)
    pool.write_job(runs[3], status="failed")
    # The last one is another driver's by now.
    with pool.held(runs[3]):
        assert [run.id for run in reset(runs, pool)] == [runs[0].id, runs[2].id]
    assert statuses(runs, pool) == ["pending", "done", "pending", "failed"]
    again = mend(path, "fail")
    assert ids(again) == ids(runs) and drive(again[:3], pool)[0] == 0
    assert pool.state(again[0]).attempt == 2 and reset(again[:3], pool) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_trainings_save_and_the_next_call_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    path, runs, pool = build(tmp_path, "sleep 60", "sleep 60", "sleep 0")
    process = start_driver(path)
    wait_until(lambda: sum((pool.run_folder(run) / "metrics.jsonl").exists() for run in runs) == 2)
    process.send_signal(number)
    text = text_of(process)
    assert process.returncode == 130 and "3 runs: 0 done, 3 to go" in text, text
    assert sorted(ledger(pool, "saved")) == sorted(ledger(pool, "start")) and len(ledger(pool, "saved")) == 2
    assert statuses(runs, pool) == ["pending"] * 3
    assert drive(mend(path, "sleep 60"), pool)[0] == 0


def test_the_third_signal_ends_what_hangs(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "hang")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    assert process.stderr is not None
    for word in ("interrupted, saving", "interrupted, stopping at once", "interrupted, killed"):
        process.send_signal(signal.SIGINT)
        assert any(word in line for line in iter(process.stderr.readline, "")), word
    text_of(process)
    assert process.returncode == 130 and statuses(runs, pool) == ["pending"]


def test_a_training_that_someone_else_interrupts_is_not_done(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 60", "sleep 0")

    def interrupt() -> None:
        wait_until(lambda: pool.state(runs[0]).step > 0)
        os.kill(pool.read_job(runs[0])["pid"], signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, text = drive(runs, pool)
    assert code == 1 and statuses(runs, pool) == ["pending", "done"] and "2 runs: 1 done, 1 to go" in text


def test_a_killed_driver_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 4", "sleep 4", "sleep 0.1", "sleep 0.1")
    process = start_driver(path)
    wait_until(lambda: len(ledger(pool, "start")) == 2)
    process.kill()
    text_of(process)
    # Its trainings go on, and hold their locks.
    assert statuses(runs, pool) == ["running", "running", "pending", "pending"]
    code, text = drive(runs, pool)
    assert code == 0 and text.count("another process is training it") == 2
    assert "[4/4]" in text and text.count("done, validation loss 4.0000, trained elsewhere") == 2
    assert sorted(ledger(pool, "start")) == sorted(ledger(pool, "end")) == ids(runs)


def test_a_killed_training_is_a_failure_of_its_own(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 60", "sleep 0.1")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0 and pool.state(runs[1]).status == "done")
    os.kill(pool.read_job(runs[0])["pid"], signal.SIGKILL)
    text = text_of(process)
    assert process.returncode == 1 and "killed by signal 9 (SIGKILL)" in text
    assert statuses(runs, pool) == ["failed", "done"]


def test_a_training_that_dies_after_its_driver_is_lost_and_trained_again(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 60")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    process.kill()
    text_of(process)
    os.kill(pool.read_job(runs[0])["pid"], signal.SIGKILL)
    wait_until(lambda: statuses(runs, pool) == ["lost"])
    assert drive(mend(path, "sleep 60"), pool)[0] == 0


def test_a_run_is_taken_over_from_a_driver_that_gives_it_up(tmp_path: Path) -> None:
    """The wait for another process ends with its interruption, not only with its success."""
    path, runs, pool = build(tmp_path, "sleep 60")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    threading.Timer(1, process.send_signal, [signal.SIGINT]).start()
    code, text = drive(mend(path, "sleep 60"), pool)
    text_of(process)
    assert code == 0 and process.returncode == 130 and "another process is training it" in text
    assert ledger(pool, "saved") == ledger(pool, "end") == [runs[0].id] and pool.state(runs[0]).attempt == 2


def test_two_drivers_share_the_work(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, *["sleep 0.5"] * 6, "fail")
    drivers = [start_driver(path), start_driver(path)]
    texts = [text_of(process) for process in drivers]
    # Whoever comes last still hears of the failure.
    assert [process.returncode for process in drivers] == [1, 1], texts
    assert sorted(ledger(pool, "start")) == ids(runs)
    assert all("7 runs: 6 done, 1 failed" in text for text in texts)


@pytest.mark.parametrize("status", ["done", "failed"])
def test_what_another_driver_ends_meanwhile_is_counted_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    begin = Job.start

    def start(run: Run, pool: Pool, **settings: Any) -> Any:
        if run is runs[0] and status == "failed":
            pool.write_job(runs[1], status="failed", message="disk full")
        elif run is runs[0]:
            pool.run_folder(runs[1]).mkdir()
            (pool.run_folder(runs[1]) / "done.json").write_text('{"step": 10, "val_loss": 3.5}')
        return begin(run, pool, **settings)

    monkeypatch.setattr(Job, "start", start)
    code, text = drive(runs, pool, jobs=1)
    words = {"done": "done, validation loss 3.5000, trained elsewhere", "failed": "failed, disk full"}[status]
    assert ledger(pool, "start") == [runs[0].id] and code == (status == "failed")
    assert f"[2/2] {runs[1].id} (kind=run1 seed=0): {words}\n" in text


def test_a_run_on_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen from here; its heartbeat is. Once that stops, the run is taken over."""
    monkeypatch.setattr("engram.sweep.pool.LOST_AFTER_SECONDS", 5)
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    beat = time.time()
    pool.write_job(runs[0], status="running", host="elsewhere", heartbeat=beat)
    code, text = drive(runs, pool)
    lines = (pool.pool / "ledger").read_text().splitlines()
    assert code == 0 and text.count("another process is training it") == 1
    assert [line.split()[:2] for line in lines] == [[run.id, word] for run in runs[::-1] for word in ("start", "end")]
    assert pool.read_job(runs[0])["started"] >= beat + 5


def test_a_run_folder_that_vanishes_is_reported(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 3", "sleep 0")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    # In one step: the trainer goes on writing.
    pool.run_folder(runs[0]).rename(tmp_path / "run_elsewhere")
    pool.job_folder(runs[0]).rename(tmp_path / "job_elsewhere")
    text = text_of(process)
    assert process.returncode == 1 and statuses(runs, pool) == ["failed", "done"], text
    assert f"failed: {runs[0].id} (main, kind=run0 seed=0): its run folder was removed while it trained" in text


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    drive(runs, pool)
    shutil.copy(pool.run_folder(runs[1]) / "config.yaml", pool.run_folder(runs[0]))
    with pytest.raises(SweepError, match=f"holds run {runs[1].id}, but its name says {runs[0].id}"):
        drive(runs, pool)


def test_a_pool_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    _, runs, _ = build(tmp_path, "sleep 0")
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="cannot be written"):
        drive(runs, Pool(tmp_path / "file" / "pool", tmp_path / "out"))


def test_a_terminal_shows_what_is_going_on(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 3", "fail", "sleep 0")
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=True, color_system=None)
    assert drive(runs, pool, console=console)[0] == 1
    shown = text.getvalue()
    line = next(line for line in shown.splitlines() if f"{runs[0].id} kind=run0 seed=0" in line and "tok/s" in line)
    assert "/10" in line and "loss 4." in line and "100 tok/s" in line and "left" in line
    assert any("2/3" in line and "about 0:00:0" in line and "left" in line for line in shown.splitlines())
    # Once each, above the bars.
    assert shown.count("[3/3]") == 1 and "started" not in shown and "3 runs: 2 done, 1 failed" in shown


def test_driving_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings of two seconds, half a minute in runs of a minute: the driver sleeps, and reads no run's progress."""
    _, runs, pool = build(tmp_path, "sleep 2", "sleep 2")
    reads = []
    look = Pool.state
    monkeypatch.setattr(Pool, "state", lambda pool, run: reads.append(run.id) or look(pool, run))
    sleeps: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(driver.time, "sleep", lambda seconds: (sleeps.append(seconds), sleep(seconds))[1])
    begin = time.process_time()
    assert drive(runs, pool)[0] == 0
    assert time.process_time() - begin < 0.05 * 4
    # On the first look by driver and display, and at the end.
    assert len(reads) == 6 and sum(sleeps) >= 1.8


def test_the_driver_needs_no_torch() -> None:
    modules = ["driver", "status", "slurm", "worker"]
    script = f"import sys, {', '.join(f'engram.sweep.{name}' for name in modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "engram.sweep.driver" in done.stdout
    assert not {"torch", "numpy", "scipy", "matplotlib", "pyarrow", "submitit"} & set(done.stdout.split())
