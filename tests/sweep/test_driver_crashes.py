"""Signals, kills, and several drivers at the same time: no run is lost, none is trained twice."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engram.sweep.driver import reset
from engram.sweep.grid import Run
from engram.sweep.pool import Pool
from engram.sweep.worker import Job
from tests.sweep.drive import build, drive, finish, ids, ledger, mend, start_driver, statuses, text_of, wait_until


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
    path, runs, pool = build(tmp_path, "sleep 3", "sleep 3", "sleep 0.1", "sleep 0.1")
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


def test_the_next_call_goes_on_with_a_killed_training(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 60", "sleep 0.1")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0 and pool.state(runs[1]).status == "done")
    os.kill(pool.read_job(runs[0])["pid"], signal.SIGKILL)
    text = text_of(process)
    assert process.returncode == 1 and "killed by signal 9 (SIGKILL); goes on from its last checkpoint" in text
    assert statuses(runs, pool) == ["pending", "done"]
    assert drive(mend(path, "sleep 60"), pool)[0] == 0


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
            finish(pool.run_folder(runs[1]), runs[1])
        return begin(run, pool, **settings)

    monkeypatch.setattr(Job, "start", start)
    code, text = drive(runs, pool, jobs=1)
    words = {"done": "done, validation loss 3.5000, trained elsewhere", "failed": "failed, disk full"}[status]
    assert ledger(pool, "start") == [runs[0].id] and code == (status == "failed")
    assert f"[2/2] {runs[1].id} (kind=run1 seed=0): {words}\n" in text


def test_a_run_on_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen from here; its heartbeat is. Once that stops, the run is taken over."""
    monkeypatch.setattr("engram.sweep.pool.LOST_AFTER_SECONDS", 2)
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    beat = time.time()
    pool.write_job(runs[0], status="running", host="elsewhere", heartbeat=beat)
    code, text = drive(runs, pool)
    lines = (pool.pool / "ledger").read_text().splitlines()
    assert code == 0 and text.count("another process is training it") == 1
    assert [line.split()[:2] for line in lines] == [[run.id, word] for run in runs[::-1] for word in ("start", "end")]
    assert pool.read_job(runs[0])["started"] >= beat + 2


def test_a_run_whose_holder_says_nothing_is_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state says pending, its lock is taken: looked at again and again, until it is free."""
    monkeypatch.setattr("engram.sweep.driver.FOREIGN_TICK", 0.1)
    _, runs, pool = build(tmp_path, "sleep 0")
    lock = pool.claim(runs[0])
    assert lock is not None
    threading.Timer(2, os.close, [lock]).start()
    code, text = drive(runs, pool)
    assert code == 0 and text.count("another process is training it") == 1 and pool.state(runs[0]).attempt == 1


def test_a_run_folder_that_vanishes_is_reported(tmp_path: Path) -> None:
    path, runs, pool = build(tmp_path, "sleep 3", "sleep 0")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    # In one step: the trainer goes on writing.
    pool.run_folder(runs[0]).rename(tmp_path / "run_elsewhere")
    pool.job_folder(runs[0]).rename(tmp_path / "job_elsewhere")
    text = text_of(process)
    assert process.returncode == 1 and statuses(runs, pool) == ["failed", "done"], text
    assert (
        f"failed: {runs[0].id} ({runs[0].part}, kind=run0 seed=0): its run folder was removed while it trained" in text
    )


def test_retry_after_a_run_folder_was_removed_does_what_was_said(tmp_path: Path) -> None:
    """The training goes on without its folder, and saves there once more: what is left can never be finished."""
    path, runs, pool = build(tmp_path, "checkpoint 2")
    process = start_driver(path)
    wait_until(lambda: pool.state(runs[0]).step > 0)
    pool.run_folder(runs[0]).rename(tmp_path / "run_elsewhere")
    first = text_of(process)
    assert process.returncode == 1 and (pool.run_folder(runs[0]) / "latest").exists()
    assert reset(runs, pool) == (runs, [])
    code, text = drive(runs, pool)
    assert code == 1
    for said in (first, text):
        assert "exit status 2: error: remove what is left of it" in said
        assert "from their last checkpoints where there are any; first see to what is said of each above" in said
    shutil.rmtree(pool.run_folder(runs[0]))
    assert reset(runs, pool) == (runs, []) and drive(runs, pool)[0] == 0
    assert ledger(pool, "end") == [runs[0].id] and pool.state(runs[0]).attempt == 3
