"""The table of all runs, and what it costs to draw it."""

import io
import json
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from engram.sweep import status
from engram.sweep.grid import Run, expand
from engram.sweep.pool import Pool
from tests.sweep import drive
from tests.sweep.build import make_sweep


def build(folder: Path, seeds: int) -> tuple[list[Run], Pool]:
    sweep = make_sweep(folder, seeds=list(range(seeds)))
    return expand(sweep), Pool(sweep.pool, sweep.out)


def finish(pool: Pool, run: Run) -> None:
    drive.finish(pool.run_folder(run), run, val_loss=3.25)


def start(pool: Pool, run: Run, step: int) -> None:
    pool.run_folder(run).mkdir(parents=True, exist_ok=True)
    line = json.dumps({"step": step, "loss": 4.5, "tokens_per_second": 64.0})
    (pool.run_folder(run) / "metrics.jsonl").write_text(line + "\n")
    pool.write_job(run, status="running", host="elsewhere", heartbeat=time.time())


def test_every_state_is_shown_and_counted(tmp_path: Path) -> None:
    runs, pool = build(tmp_path, 6)
    finish(pool, runs[0])
    finish(pool, runs[5])
    (pool.run_folder(runs[5]) / "metrics.jsonl").write_text("")
    start(pool, runs[1], step=4)
    pool.write_job(runs[2], status="failed", message="exit status 2: error: disk full")
    drive.abandon(pool, runs[3])
    console = Console(width=500, record=True, file=io.StringIO())
    console.print(status.table(runs, pool))
    lines = console.export_text().splitlines()[1:]
    for line, words in zip(
        lines,
        [
            ("done", "10/10", "3.2500"),
            ("running", "4/10", "4.5000", "0:00:06"),
            ("failed", "disk full"),
            ("lost", "its worker is gone"),
            ("pending", "0/10"),
            ("damaged", "its metrics.jsonl ends at step 0, but it was trained to step 10"),
        ],
        strict=True,
    ):
        assert all(word in line for word in words), line
    # 6 steps of one run, 10 of a lost and 10 of a pending one: 26 steps of 64 tokens at 64 tokens a second.
    text = status.summary(runs, pool)
    assert text == "6 runs: 1 done, 1 running, 1 failed, 1 damaged, 1 lost, 1 pending; about 0:00:26 left"
    assert status.summary(runs[:1], pool) == "1 run: 1 done"


def test_json_has_a_line_for_each_run(tmp_path: Path) -> None:
    runs, pool = build(tmp_path, 2)
    finish(pool, runs[0])
    first, second = status.as_json(runs, pool)
    assert json.loads(json.dumps(first))["val_loss"] == 3.25
    assert (first["id"], first["status"], second["status"], second["seed"]) == (runs[0].id, "done", "pending", 1)


def test_watching_ends_with_the_last_run(tmp_path: Path) -> None:
    runs, pool = build(tmp_path, 2)
    for run in runs:
        finish(pool, run)
    console = Console(width=120, record=True, file=io.StringIO())
    status.watch(runs, pool, console)
    assert "2 runs: 2 done" in console.export_text()


def test_watching_reads_what_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, pool = build(tmp_path, 3)
    reads: Counter[str] = Counter()
    look = Pool.state
    monkeypatch.setattr(Pool, "state", lambda pool, run: reads.update([run.id]) or look(pool, run))
    finish(pool, runs[0])
    start(pool, runs[1], step=4)
    # What happens between two looks; a failed run is no reason to go on watching.
    steps = iter(
        [
            lambda: start(pool, runs[2], step=5),
            lambda: finish(pool, runs[1]),
            lambda: pool.write_job(runs[2], status="failed"),
        ]
    )
    monkeypatch.setattr(status.time, "sleep", lambda seconds: next(steps)())
    console = Console(width=120, record=True, file=io.StringIO(), force_terminal=True)
    status.watch(runs, pool, console)
    assert [reads[run.id] for run in runs] == [1, 3, 4] and next(steps, None) is None
    assert "3 runs: 2 done, 1 failed" in console.export_text()


def test_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    """Not as markup: square brackets are lists here."""
    sweep = make_sweep(tmp_path, axes={"kind": {"[bold]": {}}})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(status.table(expand(sweep), Pool(sweep.pool, sweep.out)))
    assert "kind=[bold] seed=0" in console.export_text()


def test_a_thousand_runs_are_read_in_two_seconds(tmp_path: Path) -> None:
    runs, pool = build(tmp_path, 1000)
    for index, run in enumerate(runs):
        (finish if index % 3 == 0 else lambda pool, run: start(pool, run, step=3))(pool, run)
        if index % 3 == 1:
            # Of these, the lock is looked at.
            pool.write_job(run, status="running", host=socket.gethostname())
            (pool.job_folder(run) / "lock").touch()
    begin = time.process_time()
    status.table(runs, pool)
    text = status.summary(runs, pool)
    assert time.process_time() - begin < 2
    assert text.startswith("1,000 runs: 334 done, 333 running, 333 lost; about ")
