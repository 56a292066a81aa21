"""One run in a process of its own: its outcome, its lock, its state, its log; and once with the real `train.py`."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from engram.sweep import worker
from engram.sweep.grid import Run
from engram.sweep.pool import LOST_AFTER_SECONDS, Pool
from engram.sweep.worker import Job, Outcome, execute
from tests.sweep.build import write_sweep
from tests.sweep.drive import FAKE, abandon, build, finish, ledger, load, wait_until
from tests.training.conftest import config_tree


def start(run: Run, pool: Pool, **settings: Any) -> Job:
    job = Job.start(run, pool, command=FAKE, **settings)
    assert isinstance(job, Job), job
    return job


def is_free(run: Run, pool: Pool) -> bool:
    with pool.held(run) as mine:
        return mine


def test_a_run_that_comes_to_its_end(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 0.5")
    seen = []
    begin = time.time()
    outcome = execute(run, pool, command=FAKE, on_start=lambda job: seen.append(pool.read_job(run)))
    assert outcome == Outcome("done", exit_code=0)
    [running], ended = seen, pool.read_job(run)
    assert (running["status"], running["host"], running["attempt"]) == ("running", socket.gethostname(), 1)
    assert running["pid"] not in (None, os.getpid()) and begin <= running["heartbeat"] <= time.time()
    assert (ended["status"], ended["exit_code"], ended["message"]) == ("done", 0, "")
    assert begin <= running["started"] < ended["ended"] <= time.time()
    assert is_free(run, pool)
    log = pool.log(run).read_text().splitlines()
    assert log[0].startswith(f"--- attempt 1 on {socket.gethostname()}, ") and log[1] == "the fake trainer speaks"


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("fail", 2, "exit status 2: error: it was told to fail"),
        ("mute", 1, "exit status 1: it said nothing"),
        ("diverge", 3, "diverged: its run folder holds a post-mortem"),
        ("stop", 0, "ended without finishing: train.stop_after is set, or its done.json was removed"),
        ("crash", -6, "killed by signal 6 (SIGABRT)"),
    ],
)
def test_how_a_training_can_fail(tmp_path: Path, prompt: str, code: int, message: str) -> None:
    _, [run], pool = build(tmp_path, prompt)
    assert execute(run, pool, command=FAKE) == Outcome("failed", message, code)
    state = pool.state(run)
    assert (state.status, state.message, pool.read_job(run)["exit_code"]) == ("failed", message, code)
    assert is_free(run, pool)


def test_a_training_that_was_killed_goes_on_by_itself(tmp_path: Path) -> None:
    """By people, a cluster, or the kernel out of memory: its checkpoint is whole."""
    _, [run], pool = build(tmp_path, "die")
    message = "killed by signal 9 (SIGKILL); goes on from its last checkpoint at the next call"
    assert execute(run, pool, command=FAKE) == Outcome("interrupted", message, -9)
    assert (pool.state(run).status, pool.state(run).message) == ("pending", message)


def test_an_interrupt_in_the_middle_of_an_import_is_no_failure(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "early")

    def interrupt(job: Job) -> None:
        wait_until(lambda: pool.state(run).step > 0)
        job.interrupt()

    outcome = execute(run, pool, command=FAKE, on_start=interrupt)
    assert (outcome.status, outcome.exit_code) == ("interrupted", 1) and pool.state(run).status == "pending"


def test_words_of_an_earlier_attempt_are_not_blamed(tmp_path: Path) -> None:
    path, [run], pool = build(tmp_path, "fail")
    execute(run, pool, command=FAKE)
    pool.write_job(run, status="pending")
    path.write_text(path.read_text().replace("prompt: fail", "prompt: mute"))
    [again], _ = load(path)
    assert again.id == run.id and execute(again, pool, command=FAKE).message == "exit status 1: it said nothing"
    assert pool.state(run).attempt == 2
    log = pool.log(run).read_text()
    assert "it was told to fail" in log and log.count("--- attempt ") == 2


def test_what_others_have_made_of_a_run(tmp_path: Path) -> None:
    """A driver looks at all runs once; by the time that it comes to one, others may have been there."""
    _, [run], pool = build(tmp_path, "sleep 0")
    with pool.held(run):
        assert Job.start(run, pool, command=FAKE) == Outcome("elsewhere")
    pool.write_job(run, status="running", host="elsewhere", heartbeat=time.time())
    assert Job.start(run, pool, command=FAKE) == Outcome("elsewhere")
    pool.write_job(run, status="failed", message="disk full")
    assert Job.start(run, pool, command=FAKE) == Outcome("failed", "disk full", settled=True)
    pool.write_job(run, status="pending")
    pool.run_folder(run).mkdir()
    with open(pool.run_folder(run) / "lock", "w") as by_hand:
        fcntl.flock(by_hand, fcntl.LOCK_EX)
        assert Job.start(run, pool, command=FAKE) == Outcome("elsewhere")
    finish(pool.run_folder(run), run)
    assert Job.start(run, pool, command=FAKE) == Outcome("done", settled=True)
    (pool.run_folder(run) / "metrics.jsonl").write_text("")
    assert Job.start(run, pool, command=FAKE) == Outcome("failed", pool.damage(run), settled=True)
    assert ledger(pool, "start") == [] and is_free(run, pool)


def test_a_lost_run_is_started_again(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 0")
    abandon(pool, run, attempt=3)
    assert execute(run, pool, command=FAKE).status == "done" and pool.state(run).attempt == 4


def test_a_trainer_that_cannot_be_started(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 0")
    outcome = execute(run, pool, command=["/no/such/program"])
    assert outcome.status == "failed" and outcome.message.startswith("cannot be started: ")
    assert "/no/such/program" in outcome.message and outcome.exit_code is None
    assert pool.state(run).status == "failed" and is_free(run, pool)


def test_the_training_itself_holds_the_lock(tmp_path: Path) -> None:
    """As it must after its driver was killed, which closes the driver's own descriptor."""
    _, [run], pool = build(tmp_path, "hang")
    job = start(run, pool)
    os.close(job._lock)
    try:
        assert not is_free(run, pool) and pool.state(run).status == "running"
    finally:
        os.kill(pool.read_job(run)["pid"], signal.SIGKILL)
    wait_until(lambda: is_free(run, pool))
    assert pool.state(run).status == "lost"


def test_a_dead_starter_leaves_a_lost_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead between the note that the run is started and its start."""
    _, [run], pool = build(tmp_path, "sleep 0")

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_spawn", die)
    with pytest.raises(KeyboardInterrupt):
        Job.start(run, pool, command=FAKE)
    assert pool.state(run).status == "lost" and is_free(run, pool)


def test_interrupted_trainings_are_pending(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 60")

    def interrupt(job: Job) -> None:
        wait_until(lambda: pool.state(run).step > 0)
        job.interrupt()

    outcome = execute(run, pool, command=FAKE, on_start=interrupt)
    assert (outcome.status, outcome.exit_code) == ("interrupted", 130) and ledger(pool, "saved") == [run.id]
    assert pool.state(run).status == "pending" and pool.state(run).step > 0


def test_a_killed_training_is_pending_for_who_killed_it(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "hang")
    job = start(run, pool)
    wait_until(lambda: pool.state(run).step > 0)
    job.interrupt()
    time.sleep(0.3)
    assert job.poll() is None
    job.kill()
    wait_until(lambda: job.poll() is not None)
    assert job.poll() == job.poll() and pool.state(run).status == "pending" and is_free(run, pool)
    # Too late, and no error.
    job.interrupt()
    job.kill()


def test_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [run], pool = build(tmp_path, "hang")
    job = start(run, pool)
    first = pool.read_job(run)["heartbeat"]
    assert job.poll() is None and pool.read_job(run)["heartbeat"] == first
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.0)
    assert job.poll() is None and pool.read_job(run)["heartbeat"] > first
    # Whoever finds a deleted job folder again finds all of it.
    lease = pool.read_job(run)
    shutil.rmtree(pool.job_folder(run))
    assert job.poll() is None and pool.read_job(run) == {**lease, "heartbeat": pool.read_job(run)["heartbeat"]}
    job.kill()
    wait_until(lambda: job.poll() is not None)


def test_a_worker_beats_more_often_than_it_is_taken_for_lost() -> None:
    """A beat may be late by a slow disk, twice in a row."""
    assert 3 * worker.HEARTBEAT_SECONDS <= LOST_AFTER_SECONDS


def test_a_worker_gives_way_to_who_took_its_run_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host saw no sign of life for long, and locks are not carried there: two must not write one run folder."""
    _, [run], pool = build(tmp_path, "sleep 60")
    job = start(run, pool)
    wait_until(lambda: pool.state(run).step > 0)
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.0)
    theirs = {"status": "running", "host": "elsewhere", "started": time.time(), "heartbeat": time.time(), "attempt": 2}
    pool.write_job(run, **theirs)
    wait_until(lambda: job.poll() is not None)
    assert job.poll() == Outcome("elsewhere", "taken over by another process", -9)
    assert ledger(pool, "saved") == [] and theirs.items() <= pool.read_job(run).items() and is_free(run, pool)


def test_a_signal_handler_may_conclude_in_the_middle_of_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [run], pool = build(tmp_path, "sleep 0")
    job = start(run, pool)
    judge = Job._judge
    notes = []

    def interrupted(job: Job, code: int) -> Outcome:
        monkeypatch.setattr(Job, "_judge", judge)
        # What `checkpoint` of a cluster's task does.
        assert job.poll() == Outcome("done", exit_code=0)
        return judge(job, code)

    write = Pool.write_job
    monkeypatch.setattr(Pool, "write_job", lambda *given, **changes: notes.append(changes) or write(*given, **changes))
    monkeypatch.setattr(Job, "_judge", interrupted)
    wait_until(lambda: job.poll() is not None)
    # Concluded once: closing the lock's number a second time would close another file's.
    assert [note["status"] for note in notes] == ["done"]


def test_a_full_disk_stops_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [run, other], pool = build(tmp_path, "sleep 0", "sleep 0")
    job = start(run, pool)

    def full(*arguments: Any, **changes: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(Pool, "write_job", full)
    wait_until(lambda: job.poll() is not None)
    assert job.poll() == Outcome("done", exit_code=0)
    message = "cannot be started: [Errno 28] No space left on device"
    assert Job.start(other, pool, command=FAKE) == Outcome("failed", message)
    assert ledger(pool, "start") == [run.id] and is_free(other, pool)


def test_threads_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    _, runs, pool = build(tmp_path, *["sleep 0"] * 3)
    own = runs[2].config.train.replace(threads=3)
    runs[2] = Run(runs[2].id, "", {}, 0, runs[2].config.replace(train=own))
    execute(runs[0], pool, command=FAKE, threads=2, gpu="1")
    execute(runs[1], pool, command=FAKE)
    # The config has the last word.
    execute(runs[2], pool, command=FAKE, threads=2)
    assert [line.split()[2:] for line in (pool.pool / "ledger").read_text().splitlines() if " start" in line] == [
        ["train.threads=2", "OMP_NUM_THREADS=2", "CUDA_VISIBLE_DEVICES=1", "CUDA_DEVICE_ORDER=PCI_BUS_ID"],
        ["OMP_NUM_THREADS=5", "CUDA_VISIBLE_DEVICES=None", "CUDA_DEVICE_ORDER=None"],
        ["OMP_NUM_THREADS=5", "CUDA_VISIBLE_DEVICES=None", "CUDA_DEVICE_ORDER=None"],
    ]


def test_a_real_training_saves_goes_on_and_is_done(tmp_path: Path) -> None:
    """The contract with train.py: its arguments, exit statuses, metrics, locks and done.json."""
    generator = random.Random(3)
    words = ["".join(generator.choices("abdeiklmnorstuz", k=generator.randint(2, 7))) for _ in range(200)]
    with (tmp_path / "documents.jsonl").open("w") as corpus:
        for _ in range(150):
            corpus.write(json.dumps({"text": " ".join(generator.choices(words, k=60))}) + "\n")
    base = config_tree(tmp_path / "data", tmp_path / "documents.jsonl", tmp_path / "none")
    base["model"]["vocab_size"] = 300
    base["train"] |= {"steps": 120, "eval_every": 120, "checkpoint_every": 120, "threads": None}
    [run], pool = load(write_sweep(tmp_path, base=base))

    def interrupt(job: Job) -> None:
        wait_until(lambda: pool.state(run).step > 0 or job.poll() is not None)
        # By now the training holds its own folder as well.
        assert pool.is_trained_by_hand(run), pool.log(run).read_text()
        job.interrupt()

    outcome = execute(run, pool, threads=1, on_start=interrupt)
    assert (outcome.status, outcome.exit_code) == ("interrupted", 130), outcome
    state = pool.state(run)
    assert state.status == "pending" and 0 < state.step < 120 and (pool.run_folder(run) / "latest").exists()
    assert execute(run, pool, threads=1) == Outcome("done", exit_code=0)
    lines = [json.loads(line) for line in (pool.run_folder(run) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 121))
    state, done = pool.state(run), json.loads((pool.run_folder(run) / "done.json").read_text())
    assert (state.status, state.step, state.attempt, state.val_loss) == ("done", 120, 2, done["val_loss"])
    assert pool.check(run) == ""
    assert execute(run, pool, command=["/no/such/program"]) == Outcome("done", settled=True)
