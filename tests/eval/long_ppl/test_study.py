"""LongPPL as a command, and the evaluator's losses on disk."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.__main__ import main
from eval.bootstrap import Interval
from eval.loading import load
from eval.long_ppl import cache as long_ppl_cache
from eval.long_ppl.cache import documents_digest, evaluator_losses
from eval.long_ppl.measure import LongPpl, Losses, Windows
from eval.long_ppl.page import Draws, Measured, comparison, difference, of_key
from tests.eval.long_ppl.test_measure import random_documents


def test_losses_are_kept_under_what_they_depend_on(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, documents = load(run_folder, "cpu"), random_documents([25, 30], 300)
    windows = Windows(5, 3)
    told: list[int] = []
    first = evaluator_losses(loaded, documents, windows, tmp_path, told.append)
    assert [len(each.short) for each in first] == [len(each.whole) for each in first] == [20, 25]
    assert sum(told) > 55

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(long_ppl_cache, "short_losses", refuse)
    again = evaluator_losses(loaded, documents, windows, tmp_path)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.short, other.short) and np.array_equal(one.whole, other.whole)
    # The latest checkpoint is another than the one before; so are other documents, windows and dtypes.
    earlier = load(run_folder / "step_000006", "cpu")
    changed = [documents[0], [*documents[1][:-1], (documents[1][-1] + 1) % 300]]
    for asked in (
        (earlier, documents, windows),
        (loaded, changed, windows),
        (loaded, documents, Windows(5, 4)),
        (loaded, documents, Windows(6, 3)),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            evaluator_losses(*asked, tmp_path)


def test_digests_tell_bounds_from_tokens() -> None:
    digests = {documents_digest(each) for each in ([[1, 2, 3]], [[1, 2], [3]], [[1], [2, 3]], [[1, 2, 4]])}
    assert len(digests) == 4


def test_documents_without_key_tokens_are_left_out_of_the_draws() -> None:
    sums, counts = np.zeros(50), np.zeros(50)
    sums[:20], counts[:20] = np.arange(20.0), np.full(20, 4.0)
    found = LongPpl(sums, counts, sums, np.full(50, 10.0))
    interval = of_key(found, Draws(0.9, 0))
    assert interval.low < interval.mean < interval.high
    assert interval.mean == pytest.approx(np.exp(sums.sum() / 80))

    better = replace(found, key_sums=found.key_sums - 0.4 * counts)
    gap = difference(better, found, Draws(0.9, 0))
    assert gap == Interval(pytest.approx(-0.4), pytest.approx(-0.4), pytest.approx(-0.4))
    names = [Measured(name, "", 1, []) for name in ("a", "b")]
    assert "-0.400 nats per key token (-0.400 to -0.400), resolved" in comparison(names, [better, found], Draws(0.9, 0))

    few = [replace(each, key_counts=np.where(np.arange(50) < 9, counts, 0)) for each in (better, found)]
    assert "not resolved: 9 documents with key tokens are too few" in comparison(names, few, Draws(0.9, 0))
    none = replace(found, key_counts=np.zeros(50))
    assert comparison(names, [none, none], Draws(0.9, 0)) == "no key token was found: nothing is compared"


def test_the_command(run_folder: Path, baseline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    arguments = ["long_ppl", "--checkpoint", str(run_folder), "--baseline", str(baseline_folder), "--device", "cpu"]
    arguments += ["--evaluator", str(run_folder / "step_000006"), "--window", "4", "--stride", "2", "--out", str(out)]
    assert main([*arguments, "--alpha=-100", "--beta=-100", "--match", "loss", "--tokens", "2000"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"matched by loss: {run_folder}/step_0000") and "warning" not in printed
    assert "log LongPPL, model - baseline: " in printed and "(100.00%)" in printed
    assert main([*arguments, "--context", "18"]) == 2
    assert "do not fit into 18 tokens" in capsys.readouterr().err


def test_a_model_that_judges_itself_is_warned_of(
    workplace: Path, prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tests.eval.long_runs import train

    run = train(workplace, "long_ppl", **{"data.sequence_length": "160", "eval.tokens": "320"})
    out = tmp_path / "out"
    arguments = ["long_ppl", "--checkpoint", str(run), "--baseline", str(run / "step_000001"), "--device", "cpu"]
    arguments += ["--evaluator", str(run), "--out", str(out), "--alpha=-100", "--beta=-100", "--tokens", "1500"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "warning: model is the evaluator itself" in printed and "baseline is" not in printed
    rows = {(row["group"], row["metric"]): row for row in csv.DictReader((out / "metrics.csv").open())}
    # Without thresholds all tokens after the first window are key.
    assert rows["model", "key_loss"]["value"] == rows["model", "loss"]["value"]
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["windows"] == {"window": 20, "stride": 5} and facts["context"] == 160
    assert facts["evaluator"]["checkpoint"] == str(run / "step_000002")
    documents = {row["id"] for row in csv.DictReader((out / "items.csv").open())}
    assert len(documents) > 3
    assert {(out / f"long_ppl.{kind}").exists() for kind in ("png", "pdf", "svg", "csv", "html")} == {True}

    losses = next(iter((out / "cache").iterdir()))
    before = losses.stat().st_mtime_ns
    assert main([*arguments[:-4], "--alpha=2", "--beta=-2", "--tokens", "1500"]) == 0
    assert losses.stat().st_mtime_ns == before and len(list((out / "cache").iterdir())) == 2

    for change, message in (
        (["--context", "161"], "--context is 161, but model was trained with 160 tokens"),
        (["--window", "150", "--stride", "10"], "leave nothing of the context of 160"),
        (["--name", "evaluator"], "a model is called 'evaluator'"),
    ):
        assert main([*arguments, *change]) == 2
        assert message in capsys.readouterr().err


def test_losses_of_thresholds(run_folder: Path) -> None:
    """Both thresholds are strict."""
    losses = Losses(np.array([4.0, 4.1]), np.array([2.0, 2.0]))
    assert losses.key(2.0, -3).tolist() == [False, True] and not losses.key(1, -2).any()
