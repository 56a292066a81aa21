"""LongPPL as a task of a suite, against the study's own parts; the checkpoint of equal loss; rho in the tidy table."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from engram.config import ConfigError
from engram.model.accounting import rho
from eval.__main__ import main
from eval.documents import read_documents
from eval.loading import load, open_split
from eval.long_ppl.cache import OWN_EVALUATOR, evaluator_losses
from eval.long_ppl.measure import Windows, whole_losses
from eval.matching import match
from eval.suites.settings import load_suite
from tests.eval.suites.test_settings import rows, write

ALPHA, BETA = 0.01, -6.0


@pytest.fixture(scope="module")
def ran(run_folder: Path, baseline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the baseline, whose first checkpoint finds the key tokens; the model's checkpoint is of its loss.

    The thresholds are low: what long contexts add to a tiny model is little.
    """
    out = tmp_path_factory.mktemp("long")
    task = {"task": "long_ppl", "evaluator": str(baseline_folder / "step_000006"), "lengths": [24], "tokens": 300}
    suite = write(out / "suite.yaml", task)
    sides = ["--checkpoint", str(run_folder), "--baseline", str(baseline_folder), "--match", "loss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.suites.long_ppl.ALPHA", ALPHA)
        patch.setattr("eval.suites.long_ppl.BETA", BETA)
        assert main([str(suite), *sides, "--out", str(out / "out"), "--device", "cpu", "--threads", "1"]) == 0
    return out / "out"


def test_the_numbers_are_long_ppls(ran: Path, run_folder: Path, baseline_folder: Path, tmp_path: Path) -> None:
    chosen = match(run_folder, baseline_folder, "loss")
    loaded, evaluator = load(chosen.folder, "cpu"), load(baseline_folder / "step_000006", "cpu")
    documents = read_documents(open_split(loaded.config.data.path, loaded.tokenizer), 24, 300, min_length=4)
    masks = [each.key(ALPHA, BETA) for each in evaluator_losses(evaluator, documents, Windows(3, 1), tmp_path)]
    losses = whole_losses(loaded.model, documents, 3)
    key = np.concatenate([loss[mask] for loss, mask in zip(losses, masks, strict=True)])
    found = {row["metric"]: row for row in rows(ran / "metrics.csv") if row["task"] == "long_ppl@24"}
    assert int(found["perplexity"]["n"]) == sum(map(len, losses))
    assert float(found["perplexity"]["value"]) == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-5)
    assert int(found["long_ppl"]["n"]) == len(key) and 0 < len(key) < sum(map(len, losses))
    assert float(found["long_ppl"]["value"]) == pytest.approx(np.exp(key.mean()), rel=1e-5)
    mine = [row for row in rows(ran / "items.csv") if row["metric"] == "document_loss"]
    assert [float(row["value"]) for row in mine] == pytest.approx([loss.mean() for loss in losses], abs=1e-5)
    facts = json.loads((ran / "provenance.json").read_text())["tasks"]["long_ppl"]["24"]
    assert facts["evaluator"] == str(evaluator.folder) and (facts["window"], facts["stride"]) == (3, 1)


def test_the_evaluator_is_asked_once(ran: Path) -> None:
    assert len(list((ran / "long_ppl").glob("*.npz"))) == 1
    assert not (ran / "baseline" / "long_ppl").exists()


def test_the_checkpoint_of_equal_loss(ran: Path, run_folder: Path, baseline_folder: Path) -> None:
    found = match(run_folder, baseline_folder, "loss")
    facts = json.loads((ran / "provenance.json").read_text())
    assert facts["checkpoint_folder"] == str(found.folder) and facts["step"] == found.step
    assert facts["matched"] == f"matched by loss: {found}"
    assert "matched by loss" in (ran / "index.html").read_text()
    assert rows(ran / "comparison.csv")[0]["task"] == "long_ppl@24"


def test_an_evaluator_that_is_judged_itself_is_told(
    run_folder: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "long_ppl", "evaluator": str(run_folder), "lengths": [24], "tokens": 300}
    out = tmp_path / "out"
    run = [str(write(tmp_path / "s.yaml", task)), "--checkpoint", str(run_folder), "--device", "cpu"]
    assert main([*run, "--out", str(out)]) == 0
    told = "long_ppl: " + OWN_EVALUATOR.format(run_folder / "step_000012")
    assert f"warning: {told}" in capsys.readouterr().err and told in (out / "index.html").read_text()
    assert "is the evaluator itself" not in (ran / "index.html").read_text()


def test_the_tidy_table_has_rho(ran: Path, run_folder: Path) -> None:
    model = load(run_folder, "cpu").config.model
    for folder, expected in ((ran, rho(model)), (ran / "baseline", 1.0)):
        table = pq.read_table(folder / "metrics.parquet").to_pylist()
        assert {row["rho"] for row in table} == {expected} and 0 < rho(model) < 1


def test_mistakes(
    run_folder: Path, baseline_folder: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="task long_ppl needs an evaluator"):
        load_suite(write(tmp_path / "none.yaml", {"task": "long_ppl"}))
    with pytest.raises(ConfigError, match="task perplexity has no evaluator"):
        load_suite(write(tmp_path / "other.yaml", {"task": "perplexity", "evaluator": "x"}))
    task = {"task": "long_ppl", "evaluator": str(run_folder)}
    long = write(tmp_path / "long.yaml", {**task, "lengths": [64]})
    run = ["--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([str(long), *run]) == 2
    assert "its length is 64 tokens, but the model" in capsys.readouterr().err
    suite = write(tmp_path / "suite.yaml", task)
    for more in (["--match", "loss"], ["--match", "loss", "--baseline", str(baseline_folder), "--last", "2"]):
        assert main([str(suite), *run, *more]) == 2
        assert "--match loss chooses one checkpoint beside --baseline" in capsys.readouterr().err
