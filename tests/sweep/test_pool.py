"""How a run stands, read from its files, whole or damaged."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from engram.sweep.grid import Run, expand
from engram.sweep.pool import LOST_AFTER_SECONDS, Pool
from tests.sweep.build import make_sweep


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool", tmp_path / "out")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return expand(make_sweep(tmp_path))[0]


def write_metrics(pool: Pool, run: Run, *lines: str) -> None:
    pool.run_folder(run).mkdir(parents=True, exist_ok=True)
    (pool.run_folder(run) / "metrics.jsonl").write_text("\n".join(lines))


LINE = json.dumps({"step": 4, "loss": 2.5, "val_loss": 3.5, "tokens_per_second": 128.0})


def test_a_run_that_nobody_has_touched_is_pending(pool: Pool, run: Run) -> None:
    state = pool.state(run)
    assert (state.status, state.step, state.steps, state.loss, state.attempt) == ("pending", 0, 10, None, 0)


def test_progress_is_that_of_the_last_whole_line(pool: Pool, run: Run) -> None:
    write_metrics(pool, run, '{"step": 1, "loss": 9}', LINE, '{"step": 5, "lo')
    state = pool.state(run)
    # 6 steps of 64 tokens are left, at 128 tokens a second.
    assert (state.step, state.loss, state.val_loss, state.seconds_left) == (4, 2.5, 3.5, 3.0)


@pytest.mark.parametrize("text", ["", "\n", "{\n", "[1]\n", '"x"\n', "\x00\x00\n", '{"step": "a", "loss": NaN}\n'])
def test_damaged_metrics_are_no_progress(pool: Pool, run: Run, text: str) -> None:
    write_metrics(pool, run, text)
    assert (pool.state(run).step, pool.state(run).loss) == (0, None)


def test_a_long_file_is_read_from_its_end(pool: Pool, run: Run) -> None:
    write_metrics(pool, run, *[json.dumps({"step": 1, "note": "x" * 1000})] * 100, LINE, "")
    assert pool.state(run).step == 4


def test_the_lock_says_who_runs_on_this_host(pool: Pool, run: Run) -> None:
    lock = pool.claim(run)
    assert lock is not None and pool.claim(run) is None
    # An old heartbeat does not matter while the lock is held.
    pool.write_job(run, status="running", host=socket.gethostname(), heartbeat=0)
    assert pool.state(run).status == "running"
    os.close(lock)
    assert pool.state(run).status == "lost"


def test_the_heartbeat_says_who_runs_on_another_host(pool: Pool, run: Run) -> None:
    pool.write_job(run, status="running", host="elsewhere", heartbeat=time.time())
    assert pool.state(run).status == "running"
    pool.write_job(run, heartbeat=time.time() - LOST_AFTER_SECONDS - 1)
    assert pool.state(run).status == "lost" and pool.state(run).host == "elsewhere"


def test_done_wins_over_whatever_the_job_says(pool: Pool, run: Run) -> None:
    pool.write_job(run, status="failed", message="disk full")
    assert (pool.state(run).status, pool.state(run).message) == ("failed", "disk full")
    write_metrics(pool, run, LINE, "")
    (pool.run_folder(run) / "done.json").write_text('{"step": 10, "val_loss": 3.25}')
    state = pool.state(run)
    assert (state.status, state.step, state.val_loss) == ("done", 10, 3.25)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_state_counts_as_none(pool: Pool, run: Run, text: str) -> None:
    pool.job_folder(run).mkdir(parents=True)
    (pool.job_folder(run) / "state.json").write_text(text)
    assert pool.state(run).status == "pending"
    pool.write_job(run, status="failed")
    assert pool.state(run).status == "failed"
