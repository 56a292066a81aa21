"""The losses of a comparison against an independent loop, and by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from eval.loading import load
from eval.sides import Texts, open_runs, read_texts
from eval.studies.perplexity import Settings, loss_sample, place_sample, study


def test_places_by_hand() -> None:
    """Positions 1 | 2, 3 | 4: the mean of each octave is over targets, not over documents."""
    texts = Texts([[9] * 5, [9] * 3], "", 5)
    losses_N = np.array([1.0, 2.0, 3.0, 7.0, 5.0, 10.0])
    assert place_sample(losses_N, texts, 0).value.tolist() == [3.0, 5.0, 7.0]


def test_losses_by_hand() -> None:
    """Two bytes for token 0, one for token 1; the first token of a document is no target."""
    texts = Texts([[0, 0, 1], [1, 1]], "", 3)
    found = loss_sample(np.array([1.0, 2.0, 6.0]), texts, np.array([2, 1]), 0)
    assert found.value.tolist() == pytest.approx([3.0, 9.0 / (4 * math.log(2)), math.exp(3.0)])
    # Draws of two documents: the first twice, the second twice, or both.
    assert {round(value, 6) for value in found.draws[:, 0].tolist()} == {1.5, 6.0, 3.0}


def test_the_table_is_the_models_losses(run_folder: Path, baseline_folder: Path, tmp_path: Path) -> None:
    sides = {"model": [str(run_folder)], "baseline": [str(baseline_folder)]}
    lines = study(sides, Settings(tokens=300), tmp_path, "cpu", 1, Console(quiet=True))
    runs, tokenizer = open_runs(sides)
    documents = read_texts(runs, tokenizer, None, 300).documents
    means = []
    for run in runs:
        model, losses = load(run.folder, "cpu").model, []
        for document in documents:
            with torch.no_grad():
                logits = model(torch.tensor([document]))[0].double()
            losses += [-float(logits[place].log_softmax(-1)[token]) for place, token in enumerate(document[1:])]
        means.append(sum(losses) / len(losses))
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    found = {(row["model"], row["run"]): row for row in rows if row["metric"] == "loss"}
    assert float(found["model", "all"]["mean"]) == pytest.approx(means[0], abs=1e-5)
    assert float(found["baseline", str(runs[1].folder)]["mean"]) == pytest.approx(means[1], abs=1e-5)
    difference = found["model - baseline", "all"]
    assert float(difference["mean"]) == pytest.approx(means[0] - means[1], abs=1e-5)
    assert float(difference["low"]) < float(difference["mean"]) < float(difference["high"])
    assert {path.suffix for path in tmp_path.glob("loss_by_place.*")} == {".png", ".pdf", ".svg", ".csv"}
    assert len(lines) == 4 and lines[-1].endswith("perplexity.html")
