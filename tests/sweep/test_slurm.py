"""A sweep as a job array, with submitit's local executor in place of a cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engram.sweep import slurm, worker
from engram.sweep.grid import Run, expand
from engram.sweep.pool import Pool
from engram.sweep.queued import living_jobs, note_queued
from engram.sweep.spec import SlurmConfig, SweepError
from engram.sweep.tail import read_object
from tests.sweep.build import make_sweep
from tests.sweep.drive import build, finish, ledger, wait_until

submitit = pytest.importorskip("submitit")
FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture(autouse=True)
def fake_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task runs `train.py` of this package, of which the tests' stand-in takes the place."""
    monkeypatch.setattr(worker, "TRAIN", FAKE)


def task(run: Run, pool: Pool, threads: int = 1) -> tuple[str, str, str, str, str, int]:
    """What a task of the array is given."""
    assert slurm._make_ready(run, pool, "test")
    return slurm._arguments(run, pool, threads)


def test_a_task_trains_its_run_once(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", seeds=2)
    arguments = [task(run, pool, threads=1000) for run in runs]
    assert pool.state(runs[0]).message == "submitted to test"
    training = slurm.Training()
    assert [training(*given) for given in arguments] == ["done", "done"]
    assert [training(*given) for given in arguments] == ["done", "done"]
    assert ledger(pool, "start") == [run.id for run in runs]
    # No more threads than there are cores for the task.
    assert f" start train.threads={len(os.sched_getaffinity(0))} " in (pool.pool / "ledger").read_text()


def test_a_task_whose_run_is_trained_elsewhere(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 0")
    arguments = task(run, pool)
    with pool.held(run):
        assert not slurm._make_ready(run, pool, "test")
        assert slurm.Training()(*arguments) == "elsewhere"


def test_a_task_fails_with_its_run(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "fail")
    with pytest.raises(RuntimeError, match=f"{run.id} .kind=run0 seed=0.: exit status 2: error: it was told to fail"):
        slurm.Training()(*task(run, pool))


def test_a_cancelled_task_saves(tmp_path: Path) -> None:
    _, [run], pool = build(tmp_path, "sleep 60")
    before = signal.getsignal(signal.SIGTERM)

    def cancel() -> None:
        wait_until(lambda: pool.state(run).step > 0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=cancel).start()
    with pytest.raises(RuntimeError, match="submit it again"):
        slurm.Training()(*task(run, pool))
    assert ledger(pool, "saved") == [run.id] and pool.state(run).status == "pending"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_preempted_task_saves_and_is_queued_again(tmp_path: Path) -> None:
    """submitit calls `checkpoint` from a signal handler, with what the task was called with."""
    _, [run], pool = build(tmp_path, "sleep 60")
    training, arguments, queued = slurm.Training(), task(run, pool), []

    def preempt() -> None:
        wait_until(lambda: pool.state(run).step > 0)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(training.checkpoint(*arguments)))
    try:
        threading.Thread(target=preempt).start()
        training(*arguments)
    finally:
        signal.signal(signal.SIGUSR2, before)
    [again] = queued
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert isinstance(again.function, slurm.Training) and again.args == arguments and again.kwargs == {}
    assert ledger(pool, "saved") == [run.id] and pool.state(run).status == "pending"


def test_a_second_signal_does_not_cut_the_saving_short(tmp_path: Path) -> None:
    """A cluster sends SIGTERM, and SIGUSR2 twice; a training that hears of it twice stops at once, unsaved."""
    _, [run], pool = build(tmp_path, "slow")
    training, arguments, queued = slurm.Training(), task(run, pool), []

    def preempt() -> None:
        wait_until(lambda: pool.state(run).step > 0)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR2):
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    before = signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(training.checkpoint(*arguments)))
    sender = threading.Thread(target=preempt)
    try:
        sender.start()
        # Queued again, it has not failed.
        assert training(*arguments) == "interrupted"
    finally:
        # Not one signal more once they end the process that they are sent to.
        sender.join()
        signal.signal(signal.SIGUSR2, before)
    assert len(queued) == 2 and ledger(pool, "saved") == [run.id] and pool.state(run).status == "pending"


def test_a_task_that_was_queued_again_goes_on_beside_its_own_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node went down a moment ago: the lease looks alive."""
    _, [run], pool = build(tmp_path, "sleep 0")
    arguments = task(run, pool)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    lease = dict(status="running", host="elsewhere", heartbeat=time.time(), slurm_task="100_7")
    pool.write_job(run, **lease)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    assert slurm.Training()(*arguments) == "elsewhere"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert slurm.Training()(*arguments) == "done" and pool.read_job(run)["slurm_task"] == "100_7"


def test_a_second_submit_queues_nothing_twice(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0", "sleep 0")
    settings = SlurmConfig(partition="gpu", time_minutes=5, cpus_per_task=1, array_parallelism=4)
    # What submitit leaves running beside each local job, and a process that has its number after it ended.
    script = "import time; time.sleep(60)"
    watcher, other = (subprocess.Popen([sys.executable, "-c", script, name]) for name in ("submitit", "unrelated"))
    try:
        # A process exists for a moment before its command line can be read.
        wait_until(lambda: all(Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in (watcher, other)))
        for run, process in zip(runs, (watcher, other), strict=False):
            pool.job_folder(run).mkdir(parents=True)
            note_queued(run, pool, "local", str(process.pid))
        found = slurm.submit(runs, pool, settings, cluster="local", dry_run=True)
        assert found.queued == [(runs[0], str(watcher.pid))] and [run for run, _ in found.jobs] == runs[1:]
        assert f"queued already as job {watcher.pid}: {runs[0].id} (kind=run0 seed=0)" in found.lines()
        again = slurm.submit(runs, pool, settings, cluster="slurm", dry_run=True, again=True)
        assert [run for run, _ in again.jobs] == runs and again.queued == []
        assert again.lines()[-1].startswith("3 runs to slurm with name=engram-sweep, ")
        assert "slurm_partition=gpu, slurm_array_parallelism=4" in again.lines()[-1]
    finally:
        for process in (watcher, other):
            process.kill()
            process.wait()
    assert living_jobs(runs, pool) == {}


def test_damaged_runs_are_named_and_not_submitted(tmp_path: Path) -> None:
    _, runs, pool = build(tmp_path, "sleep 0", "sleep 0")
    finish(pool.run_folder(runs[0]), runs[0])
    (pool.run_folder(runs[0]) / "metrics.jsonl").write_text("")
    found = slurm.submit(runs, pool, SlurmConfig(), cluster="local", dry_run=True)
    assert [run for run, _ in found.jobs] == runs[1:] and found.damaged == [(runs[0], pool.damage(runs[0]))]
    assert found.lines()[0].startswith(f"damaged: {runs[0].id} (kind=run0 seed=0): ")


def test_submitting_to_the_local_executor(tmp_path: Path) -> None:
    """Real tasks in processes of their own, with the real trainer; it fails, since there is no such corpus."""
    sources = [{"path": str(tmp_path / "absent.txt")}]
    sweep = make_sweep(tmp_path, overrides={"data.path": str(tmp_path / "d"), "data.sources": sources}, seeds=[0, 1])
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    pool.write_job(runs[1], status="failed", message="disk full")
    found = slurm.submit(runs, pool, SlurmConfig(time_minutes=5, cpus_per_task=1), cluster="local")
    # Failed runs are `retry`'s.
    [(run, job)] = found.jobs
    assert run is runs[0] and job and pool.state(runs[1]).message == "disk full"
    assert read_object(pool.job_folder(run) / "queued.json")["job"] == job
    lines = found.lines()
    assert lines[0] == f"{job}  {run.id}  seed=0" and lines[1].startswith("1 run to local with name=engram-sweep")
    assert f"{pool.pool}/slurm/JOB_*" in lines[2] and lines[3].startswith("next: `status SWEEP.yaml --watch`")
    wait_until(lambda: pool.state(runs[0]).status == "failed")
    assert "absent.txt" in pool.state(runs[0]).message
    again = slurm.submit(runs, pool, SlurmConfig(), cluster="local")
    assert again.jobs == [] and again.lines() == ["no run is pending or lost: nothing to submit"]


def test_a_dry_run_submits_nothing(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=[0, 1], slurm={"partition": "gpu", "gpus_per_node": 8})
    found = slurm.submit(expand(sweep), Pool(sweep.pool, sweep.out), sweep.slurm, cluster="slurm", dry_run=True)
    last = found.lines()[-1]
    assert "2 runs to slurm" in last and "gpus_per_node=8" in last and "slurm_partition=gpu" in last
    assert not sweep.pool.exists()


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = make_sweep(tmp_path)
    with pytest.raises(SweepError, match="--cluster slurm: .*; `run` trains on this machine"):
        slurm.submit(expand(sweep), Pool(sweep.pool, sweep.out), sweep.slurm, cluster="slurm")


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    sweep = make_sweep(tmp_path)
    with pytest.raises(SweepError, match=r"pip install 'engram\[slurm\]'"):
        slurm.submit(expand(sweep), Pool(sweep.pool, sweep.out), sweep.slurm, cluster="local")
