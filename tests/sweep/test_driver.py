"""Many runs, each once: what is done, what fails, what is shown, and what it costs."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from engram.sweep import driver
from engram.sweep.driver import reset, visible_gpus
from engram.sweep.grid import Run
from engram.sweep.pool import Pool, RunState
from engram.sweep.queued import living_jobs, note_queued
from engram.sweep.spec import SweepError
from tests.sweep.drive import (
    ROOT,
    abandon,
    build,
    drive,
    ids,
    ledger,
    mend,
    statuses,
)


def starts(pool: Pool) -> list[list[str]]:
    return [line.split() for line in (pool.pool / "ledger").read_text().splitlines() if " start " in line]


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
    assert code == 0 and "nothing to do: all 4 runs are done" in text and len(ledger(pool, "start")) == 4


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
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    _, runs, pool = build(tmp_path, "sleep 0.5", "sleep 0.5")
    assert drive(runs, pool, jobs=jobs)[0] == 0
    lines = starts(pool)
    threads = 12 // runs_at_once
    assert all(line[2:4] == [f"train.threads={threads}", f"OMP_NUM_THREADS={threads}"] for line in lines)
    devices = {(line[4], line[5]) for line in lines}
    assert devices == {
        (f"CUDA_VISIBLE_DEVICES={device}", "CUDA_DEVICE_ORDER=PCI_BUS_ID") for device in "35"[:runs_at_once]
    }


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
    assert (
        f"failed: {runs[0].id} ({runs[0].part}, kind=run0 seed=0): exit status 2: error: it was told to fail\n" in text
    )
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
    abandon(pool, runs[2])
    pool.write_job(runs[3], status="failed")
    # The last one is another driver's by now.
    with pool.held(runs[3]):
        assert reset(runs, pool) == ([runs[0], runs[2]], [])
    assert statuses(runs, pool) == ["pending", "done", "pending", "failed"]
    again = mend(path, "fail")
    assert ids(again) == ids(runs) and drive(again[:3], pool)[0] == 0
    assert pool.state(again[0]).attempt == 2 and reset(again[:3], pool) == ([], [])


def test_retry_leaves_alone_what_diverged_unless_asked(tmp_path: Path) -> None:
    """From the same checkpoint, a diverged run diverges at the same step."""
    _, runs, pool = build(tmp_path, "diverge", "fail")
    drive(runs, pool)
    assert reset(runs, pool) == ([runs[1]], [runs[0]])
    assert statuses(runs, pool) == ["failed", "pending"]
    assert reset(runs, pool, diverged=True) == ([runs[0]], [])
    assert statuses(runs, pool) == ["pending", "pending"]
    # Failed for another reason after that, it is an ordinary failure.
    pool.write_job(runs[0], status="failed")
    assert reset(runs[:1], pool) == ([runs[0]], [])


def test_a_machine_that_fails_every_run_does_not_fail_the_whole_queue(tmp_path: Path) -> None:
    """As a full disk does."""
    _, runs, pool = build(tmp_path, *["fail"] * 8)
    code, text = drive(runs, pool, jobs=2)
    assert code == 1 and statuses(runs, pool).count("failed") == 6 and statuses(runs, pool)[6:] == ["pending"] * 2
    for place in (1, 2):
        assert text.count(f"place {place} of 2: 3 trainings in a row failed within 60 seconds: nothing more is") == 1
    assert "stopped, as every place for a training has failed 3 times in a row; not tried: 2 runs. " in text
    assert "8 runs: 0 done, 6 failed, 2 to go" in text


def test_a_disk_on_which_nothing_can_be_started(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, *["sleep 0"] * 5)
    code, text = drive(runs, pool, jobs=1, command=["/no/such/program"])
    assert code == 1 and statuses(runs, pool) == ["failed"] * 3 + ["pending"] * 2 and "not tried: 2 runs." in text


def test_a_broken_device_is_closed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    _, runs, pool = build(tmp_path, *["broken 0.3"] * 7)
    code, text = drive(runs, pool, jobs=2)
    assert code == 1 and "place 2 of 2 (GPU 5): 3 trainings in a row failed" in text and "place 1" not in text
    assert statuses(runs, pool).count("failed") == 3 and statuses(runs, pool).count("done") == 4
    assert [line[4] for line in starts(pool)].count("CUDA_VISIBLE_DEVICES=5") == 3


@pytest.mark.parametrize("prompts", [["fail", "fail", "sleep 0", "fail", "fail"], ["diverge"] * 5, ["die"] * 5])
def test_failures_that_are_no_fault_of_the_machine(tmp_path: Path, prompts: list[str]) -> None:
    _, runs, pool = build(tmp_path, *prompts)
    _, text = drive(runs, pool, jobs=1)
    assert len(ledger(pool, "start")) == 5 and "place" not in text


def test_failures_long_after_their_start_close_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SOON", 0.0)
    _, runs, pool = build(tmp_path, *["fail"] * 5)
    drive(runs, pool, jobs=1)
    assert statuses(runs, pool) == ["failed"] * 5


def test_a_damaged_run_is_named_and_blocks_no_other(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0", "sleep 0")
    drive(runs[:1], pool)
    (pool.run_folder(runs[0]) / "metrics.jsonl").write_text("")
    code, text = drive(runs, pool)
    assert code == 1 and statuses(runs, pool) == ["damaged", "done", "done"]
    folder = pool.run_folder(runs[0])
    assert f"damaged: {runs[0].id} ({runs[0].part}, kind=run0 seed=0): {folder} is damaged: its metrics.jsonl" in text
    shutil.rmtree(folder)
    assert drive(runs, pool)[0] == 0 and statuses(runs, pool) == ["done"] * 3


def test_what_waits_in_a_clusters_queue_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0", "fail")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = tmp_path / "squeue"
    script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\nprintf '77_0\\n78\\n'\n")
    script.chmod(0o755)
    assert drive(runs[2:], pool)[0] == 1 and not (tmp_path / "asked").exists()
    for run, job in zip(runs, ("77_0", "77_1", "78"), strict=True):
        pool.job_folder(run).mkdir(parents=True, exist_ok=True)
        note_queued(run, pool, "slurm", job)
    assert living_jobs(runs, pool) == {runs[0].id: "77_0", runs[2].id: "78"}
    code, text = drive(runs, pool)
    assert code == 1 and statuses(runs, pool) == ["pending", "done", "failed"]
    assert "1 run left to the queue that `submit` put them in (jobs 77_0): cancel those jobs, or give --again" in text
    assert "--array --name=engram-sweep" in (tmp_path / "asked").read_text()
    # What failed is no job's any more.
    assert reset(runs, pool) == ([runs[2]], []) and runs[2].id not in living_jobs(runs, pool)
    assert drive(runs[:2], pool, again=True)[0] == 0 and runs[0].id not in living_jobs(runs, pool)


def test_a_queue_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs, pool = build(tmp_path, "sleep 0")
    pool.job_folder(runs[0]).mkdir(parents=True)
    note_queued(runs[0], pool, "slurm", "77")
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    for folder in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(folder))
        with pytest.raises(SweepError, match="jobs 77 were submitted .*, but squeue cannot say .* or give --again"):
            drive(runs, pool)
    assert drive(runs, pool, again=True)[0] == 0


def test_a_finished_run_of_other_settings_is_named(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    drive(runs, pool)
    shutil.copy(pool.run_folder(runs[1]) / "config.yaml", pool.run_folder(runs[0]))
    code, text = drive(runs, pool)
    assert code == 1 and f"holds run {runs[1].id}, not {runs[0].id}; move" in text


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
    """Less than 5 % of the trainings' time: the driver sleeps, and reads no progress that nobody looks at."""
    _, runs, pool = build(tmp_path, "sleep 2", "sleep 2")
    reads: list[str] = []
    sleeps: list[float] = []
    look, sleep = Pool.state, time.sleep

    def counted_look(pool: Pool, run: Run) -> RunState:
        reads.append(run.id)
        return look(pool, run)

    def counted_sleep(seconds: float) -> None:
        sleeps.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(Pool, "state", counted_look)
    monkeypatch.setattr(driver.time, "sleep", counted_sleep)
    begin = time.process_time()
    assert drive(runs, pool)[0] == 0
    assert time.process_time() - begin < 0.05 * 4, "of two trainings of two seconds"
    # On the first look by driver and display, and at the end.
    assert len(reads) == 6 and sum(sleeps) >= 1.8


def test_the_driver_needs_no_torch() -> None:
    modules = ["driver", "status", "slurm", "worker"]
    script = f"import sys, {', '.join(f'engram.sweep.{name}' for name in modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "engram.sweep.driver" in done.stdout
    assert not {"torch", "numpy", "scipy", "matplotlib", "pyarrow", "submitit"} & set(done.stdout.split())
