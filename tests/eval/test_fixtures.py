"""The checked-in runs: checkpoints of an earlier version are read, judged and trained on as they were then."""

import shutil
from pathlib import Path

import pytest

from engram.config import load_config
from engram.data.shards import verify_folder
from engram.training.metrics import read_metrics
from engram.training.trainer import Trainer
from eval import perplexity
from eval.loading import load, open_split

ROOT = Path(__file__).parents[2]
RUNS = ("engram", "moe")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_of(name: str) -> Path:
    return ROOT / "tests/fixtures/runs" / name


@pytest.mark.parametrize("name", RUNS)
def test_an_older_checkpoint_has_the_loss_that_it_had(name: str) -> None:
    loaded = load(run_of(name), "cpu", threads=1)
    config, last = loaded.config, read_metrics(run_of(name) / "metrics.jsonl")[-1]
    assert last["step"] == loaded.step == config.train.stop_after
    dataset = open_split(config.data.path, loaded.tokenizer)
    found = perplexity.measure_split(
        loaded.model,
        loaded.tokenizer,
        dataset,
        config.data.sequence_length,
        config.eval.batch_size,
        config.eval.tokens,
    )
    assert found.loss == pytest.approx(last["val_loss"], abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_goes_on(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(run_of(name), tmp_path / name, symlinks=True)
    config = load_config(run / "config.yaml")
    before = read_metrics(run / "metrics.jsonl")
    train = config.train.replace(stop_after=config.train.stop_after + 2, log_every=1)
    assert Trainer(config.replace(run_dir=str(run), train=train)).fit() == 0
    first, second = read_metrics(run / "metrics.jsonl")[len(before) :]
    assert (first["step"], second["step"]) == (81, 82)
    # Weights that were not read start 2 nats higher, and a first step without the optimizer's state goes astray.
    assert second["loss"] == pytest.approx(before[-1]["loss"], abs=0.3)


def test_their_data_is_whole() -> None:
    verify_folder(ROOT / "tests/fixtures/data")
