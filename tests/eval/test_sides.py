"""Which runs may stand side by side, and how their numbers become rows."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engram.config import UserError
from engram.data.shards import Dataset
from eval import sides
from eval.over_runs import Sample
from eval.sided_table import ALL, compared, estimates, picked, rows, side_of
from eval.sides import Run, open_runs, read_texts


def test_runs_and_texts(run_folder: Path, baseline_folder: Path, prepared_folder: Path) -> None:
    early = run_folder / "step_000006"
    runs, tokenizer = open_runs({"memory": [str(run_folder), str(early)], "MoE": [str(baseline_folder)]})
    assert [(run.side, run.step, run.num_layers) for run in runs] == [
        ("memory", 12, 2),
        ("memory", 6, 2),
        ("MoE", 12, 2),
    ]
    assert sides.of_side(runs, "memory") == [0, 1] and sides.of_side(runs, "MoE") == [2]
    texts = read_texts(runs, tokenizer, None, 200)
    assert texts.folder == str(prepared_folder) and texts.length == 32
    assert all(2 <= len(document) <= 32 for document in texts.documents)
    first = Dataset(prepared_folder, "validation").window(0, 5).tolist()
    assert texts.documents[0][:5] == first
    assert texts.targets == sum(map(len, texts.documents)) - len(texts.documents) <= 200
    assert runs[1].facts() == {"model": "memory", "checkpoint": str(early), "step": 6, "seed": runs[1].seed}


def test_refusals(run_folder: Path, baseline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="given twice"):
        open_runs({"a": [str(run_folder), str(run_folder / "step_000012")]})
    with pytest.raises(UserError, match="differ in blocks, memory layers or streams"):
        open_runs({"a": [str(run_folder), str(baseline_folder)]})
    # The same run may stand on both sides: a null.
    assert len(open_runs({"a": [str(run_folder)], "b": [str(run_folder)]})[0]) == 2
    opened = sides.open_checkpoint

    def other_tokenizer(path: str) -> object:
        found = opened(path)
        digest = "f" * 64 if Path(path) == baseline_folder else found.tokenizer().digest
        return SimpleNamespace(
            folder=found.folder,
            config=found.config,
            state=found.state,
            tokenizer=lambda: SimpleNamespace(digest=digest),
        )

    monkeypatch.setattr(sides, "open_checkpoint", other_tokenizer)
    with pytest.raises(UserError, match=r"ffffffffffff.*predictions are of different tokens"):
        open_runs({"a": [str(run_folder)], "b": [str(baseline_folder)]})


def runs_of(*names: str) -> list[Run]:
    return [
        Run(name, Path(f"runs/{index}"), SimpleNamespace(seed=index), 3)  # type: ignore[arg-type]
        for index, name in enumerate(names)
    ]


def test_rows_of_runs_sides_and_their_difference() -> None:
    runs = runs_of("new", "new", "old", "old")
    samples = [Sample(np.array([value, 0.0]), np.tile([value, 0.0], (50, 1))) for value in (3.0, 3.2, 1.0, 1.2)]
    found = estimates(runs, samples, 0.9)
    assert [(one.side, one.run) for one in found] == [("new", 0), ("new", 1), ("old", 2), ("old", 3)] + [
        ("new", None),
        ("old", None),
    ]
    assert side_of(found, "old").mean[0] == pytest.approx(1.1)
    difference = compared(runs, samples, 0.9)
    assert difference is not None and difference.side == "new - old" and compared(runs[:2], samples[:2], 0.9) is None
    table = rows([*found, difference], runs, [{"scalar": "x"}, {"scalar": "y"}])
    assert len(table) == 14 and table[2] == {
        "model": "new",
        "run": "runs/1",
        "seed": 1,
        "scalar": "x",
        "mean": 3.2,
        "low": 3.2,
        "high": 3.2,
        "resolved": None,
    }
    # Two seeds of each say nothing of their recipes.
    assert [(row["run"], row["seed"], row["resolved"]) for row in table[-2:]] == [
        (ALL, None, "in these runs"),
        (ALL, None, "no"),
    ]
    enough = replace(difference, runs=3)
    assert [row["resolved"] for row in rows([enough], runs, [{"scalar": "x"}, {"scalar": "y"}])] == ["yes", "no"]
    assert table[-2]["mean"] == pytest.approx(2.0)


def test_unknown_ends_are_empty_cells() -> None:
    """One document tells no spread."""
    runs = runs_of("new")
    sample = Sample(np.array([1.0]), np.full((50, 1), np.nan))
    row = rows(estimates(runs, [sample], 0.9), runs, [{}])[0]
    assert (row["mean"], row["low"], row["high"]) == (1.0, None, None)


def test_picking_keeps_draws_with_their_numbers() -> None:
    rng = np.random.default_rng(0)
    sample = Sample(rng.normal(size=(4, 3)), rng.normal(size=(7, 4, 3)))
    one = picked(sample, ([2, 0], 1))
    np.testing.assert_array_equal(one.value, [sample.value[2, 1], sample.value[0, 1]])
    np.testing.assert_array_equal(one.draws[5], [sample.draws[5, 2, 1], sample.draws[5, 0, 1]])
    np.testing.assert_array_equal(picked(sample, [3]).draws[2], sample.draws[2, [3]])
