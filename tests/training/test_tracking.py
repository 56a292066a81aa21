"""W&B may be there, absent or broken: a run goes on, with one warning at most."""

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram.config import Config
from engram.training.tracking import Tracker
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import metrics_of

MakeConfig = Callable[..., Config]
OFFLINE = {"train": {"wandb": {"mode": "offline", "project": "tests"}, "steps": 3}}


class FakeRun:
    """A run that records, and fails where it is told to."""

    def __init__(self, failing: str = "", **options: Any) -> None:
        self.options, self.failing, self.calls = options, failing, []

    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append((name, args, kwargs))
        if name == self.failing:
            raise RuntimeError("no\nspace")

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._call("log", *args, **kwargs)

    def finish(self, **kwargs: Any) -> None:
        self._call("finish", **kwargs)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[FakeRun]]:
    """fake_wandb(failing): stands in for the package, and returns the list of its runs."""

    def install(failing: str = "") -> list[FakeRun]:
        runs: list[FakeRun] = []

        def init(**options: Any) -> FakeRun:
            runs.append(FakeRun(failing, **options))
            runs[-1]._call("init")
            return runs[-1]

        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
        return runs

    return install


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_disabled_does_not_even_import(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(make_config(), Path("anywhere"), "id")
    tracker.log({"step": 1})
    tracker.finish(0)


def test_an_absent_package_is_one_warning(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(**OFFLINE)
    assert Trainer(config).fit() is Exit.DONE
    assert len(metrics_of(config.run_dir)) == 3
    (warning,) = warnings(caplog)
    assert warning.startswith("W&B is off for this run: import of wandb halted")


@pytest.mark.parametrize(("failing", "calls"), [("init", 1), ("log", 2), ("finish", 5)])
def test_a_failure_is_one_warning(
    make_config: MakeConfig, fake_wandb: Callable, caplog: pytest.LogCaptureFixture, failing: str, calls: int
) -> None:
    runs = fake_wandb(failing)
    assert Trainer(make_config(**OFFLINE)).fit() is Exit.DONE
    assert warnings(caplog) == ["W&B is off for this run: no space (train.wandb.mode=disabled avoids this line)"]
    # After a failure it is left alone.
    assert len(runs[0].calls) == calls


def test_what_is_sent(make_config: MakeConfig, fake_wandb: Callable) -> None:
    runs = fake_wandb()
    config = make_config(**OFFLINE)
    Trainer(config.replace(train=config.train.replace(stop_after=2))).fit()
    Trainer(config).fit()
    first, second = (run.options for run in runs)
    assert first["mode"] == "offline" and first["project"] == "tests" and first["name"] == "run"
    assert first["dir"] == Path(config.run_dir)
    assert first["config"]["optim"]["lr"] == 0.003
    # One id for all starts of a run.
    assert first["id"] == second["id"]
    sent = [(kwargs["step"], args[0]["loss"]) for run in runs for name, args, kwargs in run.calls if name == "log"]
    assert sent == [(line["step"], line["loss"]) for line in metrics_of(config.run_dir)]
    assert [run.calls[-1] for run in runs] == [("finish", (), {"exit_code": 0})] * 2


def test_the_real_package_offline(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = make_config(**OFFLINE)
    assert Trainer(config).fit() is Exit.DONE
    files = list((Path(config.run_dir) / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0
    assert "W&B is off" not in (Path(config.run_dir) / "log.txt").read_text()
