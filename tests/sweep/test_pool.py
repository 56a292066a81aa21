"""How a run stands, read from its files, whole or damaged."""

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from engram.sweep.grid import Run, expand
from engram.sweep.pool import LOST_AFTER_SECONDS, Pool, slurm_task
from engram.sweep.spec import SweepError
from tests.sweep.build import make_sweep
from tests.sweep.drive import abandon, finish

LINE = json.dumps({"step": 4, "loss": 2.5, "val_loss": 3.5, "tokens_per_second": 128.0})


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool", tmp_path / "out")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return expand(make_sweep(tmp_path))[0]


def write_metrics(pool: Pool, run: Run, *lines: str) -> None:
    pool.run_folder(run).mkdir(parents=True, exist_ok=True)
    (pool.run_folder(run) / "metrics.jsonl").write_text("\n".join(lines))


def test_a_run_that_nobody_has_touched_is_pending(pool: Pool, run: Run) -> None:
    state = pool.state(run)
    assert (state.status, state.step, state.steps, state.loss, state.attempt) == ("pending", 0, 10, None, 0)
    # To look at it makes nothing.
    assert not pool.pool.exists()


def test_progress_is_that_of_the_last_whole_line(pool: Pool, run: Run) -> None:
    write_metrics(pool, run, '{"step": 1, "loss": 9}', LINE, '{"step": 5, "lo')
    state = pool.state(run)
    # 6 steps of 64 tokens are left, at 128 tokens a second.
    assert (state.step, state.loss, state.val_loss, state.seconds_left) == (4, 2.5, 3.5, 3.0)


@pytest.mark.parametrize("text", ["", "[1]\n", '{"step": "a", "loss": NaN}\n'])
def test_damaged_metrics_are_no_progress(pool: Pool, run: Run, text: str) -> None:
    write_metrics(pool, run, text)
    assert (pool.state(run).step, pool.state(run).loss) == (0, None)


def test_the_lock_says_who_runs_on_this_host(pool: Pool, run: Run) -> None:
    lock = pool.claim(run)
    assert lock is not None and pool.claim(run) is None
    # An old heartbeat does not matter while the lock is held.
    pool.write_job(run, status="running", host=socket.gethostname(), heartbeat=0)
    assert pool.state(run).status == "running"
    with pool.held(run) as mine:
        assert not mine
    os.close(lock)
    assert pool.state(run).status == "lost"
    with pool.held(run) as mine:
        assert mine and pool.claim(run) is None


def test_onlookers_turn_no_driver_away(pool: Pool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether a lock is held has it for an instant."""
    pool.job_folder(run).mkdir(parents=True)
    onlooker = open(pool.job_folder(run) / "lock", "w")  # noqa: SIM115
    fcntl.flock(onlooker, fcntl.LOCK_SH)
    monkeypatch.setattr("engram.sweep.pool.time.sleep", lambda seconds: onlooker.close())
    lock = pool.claim(run)
    assert lock is not None and onlooker.closed
    os.close(lock)


def test_onlookers_do_not_see_each_other(pool: Pool, run: Run) -> None:
    pool.write_job(run, status="running", host=socket.gethostname())
    with open(pool.job_folder(run) / "lock", "w") as onlooker:
        fcntl.flock(onlooker, fcntl.LOCK_SH)
        assert pool.state(run).status == "lost"


def test_the_heartbeat_says_who_runs_on_another_host(pool: Pool, run: Run) -> None:
    abandon(pool, run, heartbeat=time.time())
    assert pool.state(run).status == "running" and pool.runs_on_another_host(run)
    abandon(pool, run, heartbeat=time.time() - LOST_AFTER_SECONDS - 1)
    assert pool.state(run).status == "lost" and pool.state(run).host == "elsewhere"
    assert not pool.runs_on_another_host(run)
    abandon(pool, run, heartbeat="yesterday")
    assert pool.state(run).status == "lost"
    abandon(pool, run, heartbeat=time.time(), host=socket.gethostname())
    assert not pool.runs_on_another_host(run)


def test_clocks_of_two_hosts_may_differ(pool: Pool, run: Run) -> None:
    """The file server's time of the last metrics, or of the lease, is a sign of life too."""
    now, far = time.time(), 10 * LOST_AFTER_SECONDS
    write_metrics(pool, run, LINE, "")
    for lease_time, metrics_time, alive in ((now, 0, True), (0, now, True), (0, 0, False), (now + far, 0, False)):
        # The worker's clock is behind, or ahead.
        for heartbeat in (now - far, now + far):
            pool.write_job(run, status="running", host="elsewhere", heartbeat=heartbeat)
            os.utime(pool.job_folder(run) / "state.json", (lease_time, lease_time))
            os.utime(pool.run_folder(run) / "metrics.jsonl", (metrics_time, metrics_time))
            assert pool.runs_on_another_host(run) is alive
            assert pool.state(run).status == ("running" if alive else "lost")


def test_a_task_that_was_queued_again_takes_its_own_run(pool: Pool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_task() is None
    pool.write_job(run, status="running", host="elsewhere", heartbeat=time.time(), slurm_task="100_7")
    assert pool.runs_on_another_host(run)
    monkeypatch.setenv("SLURM_JOB_ID", "107")
    assert slurm_task() == "107" and pool.runs_on_another_host(run)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    assert pool.runs_on_another_host(run)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert not pool.runs_on_another_host(run)


def test_a_training_that_was_started_by_hand(pool: Pool, run: Run) -> None:
    """`train.py` locks its run folder; nobody who only wants to know may hold that lock exclusively."""
    assert not pool.is_trained_by_hand(run)
    pool.run_folder(run).mkdir(parents=True)
    with open(pool.run_folder(run) / "lock", "w") as file:
        assert not pool.is_trained_by_hand(run)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert pool.is_trained_by_hand(run)
    assert not pool.is_trained_by_hand(run)


def test_done_wins_over_whatever_the_job_says(pool: Pool, run: Run) -> None:
    pool.write_job(run, status="failed", message="disk full")
    assert (pool.state(run).status, pool.state(run).message) == ("failed", "disk full")
    finish(pool.run_folder(run), run, val_loss=3.25)
    state = pool.state(run)
    assert (state.status, state.step, state.val_loss) == ("done", 10, 3.25) and pool.is_done(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_state_counts_as_none(pool: Pool, run: Run, text: str) -> None:
    pool.job_folder(run).mkdir(parents=True)
    (pool.job_folder(run) / "state.json").write_text(text)
    assert pool.state(run).status == "pending"
    pool.write_job(run, status="failed")
    assert pool.state(run).status == "failed"


def keep(folder: Path, run: Run, *, done: bool) -> None:
    finish(folder, run)
    if not done:
        (folder / "done.json").unlink()


DAMAGES = {
    "metrics.jsonl": [("", "ends at step 0, but it was trained to step 10"), ('{"step": 9}\n{"step": 10', "at step 9")],
    "done.json": [("", "names no step"), ("[]", "names no step"), ('{"step": null}', "names no step")],
}


@pytest.mark.parametrize(("name", "text", "wrong"), [(k, *case) for k, cases in DAMAGES.items() for case in cases])
def test_a_finished_run_that_lost_something_is_not_done(pool: Pool, run: Run, name: str, text: str, wrong: str) -> None:
    folder = pool.run_folder(run)
    finish(folder, run)
    assert pool.is_done(run) and pool.damage(run) == pool.check(run) == ""
    (folder / name).write_text(text)
    state = pool.state(run)
    assert state.status == "damaged" and not pool.is_done(run)
    assert wrong in state.message and f"move {folder} away" in state.message
    assert pool.damage(run) == pool.check(run) == state.message
    # A whole copy makes up for it, and a damaged copy for nothing.
    finish(pool.copy_folder(run), run)
    assert pool.state(run).status == "done" and pool.finished_folder(run) == pool.copy_folder(run)
    (pool.copy_folder(run) / "config.yaml").unlink()
    assert pool.state(run).status == "damaged"


@pytest.mark.parametrize("place", ["pool", "out", "job"])
def test_what_is_kept_under_an_id_must_be_that_run(tmp_path: Path, pool: Pool, place: str) -> None:
    run, other = expand(make_sweep(tmp_path, seeds=[0, 1]))
    folder = dict(pool=pool.run_folder(run), out=pool.out / "runs" / run.id, job=pool.job_folder(run))[place]
    assert pool.check(run) == ""
    keep(folder, run, done=place != "job")
    assert pool.check(run) == ""
    shutil.rmtree(folder)
    keep(folder, other, done=place != "job")
    wrong = f"{folder} holds run {other.id}, not {run.id}; move {folder} away, and `run` trains the run anew"
    assert pool.check(run) == wrong


def test_settings_without_effect_may_differ(pool: Pool, run: Run) -> None:
    elsewhere = run.config.replace(run_dir="elsewhere", train=run.config.train.replace(threads=7))
    keep(pool.run_folder(run), Run(run.id, run.part, run.point, run.seed, elsewhere), done=True)
    assert pool.check(run) == ""


def test_a_config_that_cannot_be_read(pool: Pool, run: Run) -> None:
    keep(pool.job_folder(run), run, done=False)
    (pool.job_folder(run) / "config.yaml").write_text("model: {}")
    # It is written anew.
    assert pool.check(run) == ""
    finish(pool.run_folder(run), run)
    (pool.run_folder(run) / "config.yaml").write_text("model: {}")
    # Looking at all runs of a sweep takes no config's time.
    assert pool.state(run).status == "done"
    assert f"{run.id}/config.yaml: model.num_layers: is required and missing" in pool.check(run)


def test_a_pool_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="file/pool: cannot be written .*: choose another"):
        Pool(tmp_path / "file" / "pool", tmp_path / "out").prepare()
