"""The alignment shift of several runs: which are compared, with what null, and how it becomes rows."""

from pathlib import Path

import numpy as np
import pytest

from engram.config import UserError
from eval.cka.alignment import measure_alignment
from eval.depth.shift import measure_shift, shift_rows, shift_scalar_rows
from eval.entities import entity_positions, passages_of
from eval.lens.tables import Settings
from eval.loading import load
from eval.sides import Texts, open_runs

NAMES = ["Anna", "Bert", "Cleo", "Dora", "Emil", "Fred", "Gina", "Hans", "Ida", "Jan", "Karl", "Lena", "Mia", "Nora"]
SETTINGS = Settings(draws=100, seed=3)


@pytest.fixture(scope="module")
def texts(run_folder: Path) -> Texts:
    tokenizer = load(run_folder, "cpu").tokenizer
    documents = [
        tokenizer.encode(f"the people of {name} shall have {other}")
        for name, other in zip(NAMES, reversed(NAMES), strict=True)
    ]
    return Texts(documents, "nowhere", 32)


def test_a_run_against_itself_is_not_shifted(run_folder: Path, texts: Texts) -> None:
    runs, tokenizer = open_runs({"a": [str(run_folder)], "b": [str(run_folder)]})
    found = measure_shift(runs, texts, tokenizer, SETTINGS, "cpu", 1)
    np.testing.assert_allclose(found.by_block.mean, [0, 0], atol=1e-12)
    assert "b against itself" in found.described and f"{len(NAMES)} entities" in found.described


def test_runs_are_compared_in_pairs_with_a_null_between_seeds(
    run_folder: Path, baseline_folder: Path, texts: Texts
) -> None:
    early = baseline_folder / "step_000006"
    paths = {"a": [run_folder, run_folder / "step_000006"], "b": [baseline_folder, early]}
    runs, tokenizer = open_runs({side: [str(path) for path in some] for side, some in paths.items()})
    found = measure_shift(runs, texts, tokenizer, SETTINGS, "cpu", 1)
    positions = entity_positions(passages_of(texts.documents, tokenizer), tokenizer, 32).positions
    expected = []
    for model, baseline, other in ((paths["a"][0], baseline_folder, early), (paths["a"][1], early, baseline_folder)):
        models = [load(path, "cpu").model for path in (model, baseline, other)]
        one = measure_alignment(*models[:2], positions, other_baseline=models[2], draws=100, seed=3)
        expected.append(one.aligned.value - one.null.value)
    np.testing.assert_allclose(found.by_block.mean, np.mean(expected, axis=0))
    assert found.mean.mean == pytest.approx(np.mean(expected)) and np.abs(expected).max() > 1e-4
    table, (scalar,) = list(shift_rows(found, runs)), list(shift_scalar_rows(found, runs))
    assert [(row["model"], row["measure"], row["layer"]) for row in table] == [
        ("a - b", "alignment_shift", 0),
        ("a - b", "alignment_shift", 1),
    ]
    assert (scalar["model"], scalar["scalar"], scalar["unit"]) == ("a - b", "alignment_shift", "blocks")
    assert scalar["mean"] == pytest.approx(np.mean(expected))


def test_refusals(run_folder: Path, texts: Texts) -> None:
    runs, tokenizer = open_runs({"a": [str(run_folder)]})
    with pytest.raises(UserError, match="--baseline"):
        measure_shift(runs, texts, tokenizer, SETTINGS, "cpu", 1)
