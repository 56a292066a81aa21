"""A sweep as a job array, with submitit's local executor in place of a cluster."""

import sys
import time
from pathlib import Path

import pytest

from engram.sweep import slurm, worker
from engram.sweep.grid import expand
from engram.sweep.pool import Pool
from engram.sweep.spec import SlurmConfig, SweepError
from tests.sweep.build import make_sweep

pytest.importorskip("submitit")
FAKE = Path(__file__).with_name("fake_train.py")


def test_an_array_trains_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is trained by `train.py` of this package, of which the tests' stand-in takes the place."""
    monkeypatch.setattr(worker, "TRAIN", FAKE)
    # The tasks are processes of their own.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    sweep = make_sweep(tmp_path, axes={"kind": {"good": {"eval.prompt": "sleep 0"}}}, seeds=[0, 1])
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    job = slurm.Training()
    arguments = []
    for run in runs:
        pool.job_folder(run).mkdir(parents=True)
        worker.save_config(run.config, pool.job_folder(run) / "config.yaml")
        arguments.append(slurm._arguments(run, pool))
    assert [job(*given) for given in arguments] == ["done", "done"]
    assert [job(*given) for given in arguments] == ["done", "done"]
    assert len((pool.pool / "ledger").read_text().splitlines()) == 4


def test_submitting_to_the_local_executor(tmp_path: Path) -> None:
    """Real tasks in processes of their own; the trainings fail, since there is no such corpus, and say so."""
    sources = [{"path": str(tmp_path / "absent.txt")}]
    sweep = make_sweep(tmp_path, overrides={"data.path": str(tmp_path / "d"), "data.sources": sources})
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    ids = slurm.submit(runs, pool, SlurmConfig(time_minutes=5, cpus_per_task=1), cluster="local")
    assert len(ids) == 1
    end = time.monotonic() + 60
    while pool.state(runs[0]).status != "failed":
        assert time.monotonic() < end, list((pool.pool / "slurm").glob("*"))
        time.sleep(0.2)
    assert "absent.txt" in pool.state(runs[0]).message


def test_a_dry_run_submits_nothing(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=[0, 1], slurm={"partition": "gpu", "gpus_per_node": 8})
    lines = slurm.submit(expand(sweep), Pool(sweep.pool, sweep.out), sweep.slurm, cluster="slurm", dry_run=True)
    assert "2 runs to slurm" in lines[0] and "gpus_per_node=8" in lines[0] and "slurm_partition=gpu" in lines[0]
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
