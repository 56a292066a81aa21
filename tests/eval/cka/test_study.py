"""`python -m eval cka`: its tables, and what it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from eval.__main__ import main
from eval.cka.study import _pairs
from tests.eval.conftest import tiny_config


def cka(*arguments: object) -> int:
    return main(["cka", *map(str, arguments), "--device", "cpu"])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def entities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entities that end in different words of the tiny models' corpus."""
    path = tmp_path_factory.mktemp("entities") / "few_nerd.txt"
    words = ["people", "union", "states", "congress", "power", "taxes", "defence", "café", "collect", "東京"]
    lines = [f"the\tO\n{a}\tplace\n{b}\tplace\nshall\tO\n" for a in words for b in words if a != b]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_tables_of_two_runs(run_folder: Path, baseline_folder: Path, entities: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--checkpoint", run_folder, "--baseline", baseline_folder, run_folder / "step_000006")
    # Runs of one side are of one recipe: this one has a memory, the baseline has none.
    assert cka(*arguments, "--entities", entities, "--out", out) == 2

    arguments = ("--checkpoint", run_folder, "--baseline", baseline_folder, baseline_folder / "step_000006")
    options = ("--entities", entities, "--batch", 40, "--top-k", 1, "--exact", "--out", out)
    assert cka(*arguments, *options) == 0
    for name in ("cka", "alignment"):
        assert {path.suffix for path in out.glob(f"{name}.*")} >= {".png", ".pdf", ".svg", ".csv"}
    page = (out / "cka.html").read_text()
    assert "bent at the edges" in page and "http" not in page

    matrix = table(out / "cka.csv")
    assert len(matrix) == 3 * 2 * 2
    for row in matrix:
        assert int(row["layer_number"]) == int(row["layer"]) + 1
        assert int(row["baseline_layer_number"]) == int(row["baseline_layer"]) + 1
        assert float(row["low"]) - 1e-9 <= float(row["cka"]) <= float(row["high"]) + 1e-9 < 1.1
        assert float(row["cka"]) == pytest.approx(float(row["exact"]), abs=0.15)
        if row["matrix"] == "self" and row["layer"] == row["baseline_layer"]:
            assert float(row["cka"]) == pytest.approx(1)

    rows = table(out / "alignment.csv")
    values = {(row["how"], row["quantity"], row["null"], row["layer"]): float(row["mean"]) for row in rows}
    for how in ("soft", "argmax", "dtw"):
        for null in ("self", "seeds"):
            shifts = [values[how, "shift", null, layer] for layer in "01"]
            for layer, shift in zip("01", shifts, strict=True):
                assert shift == pytest.approx(values[how, "aligned", "", layer] - values[how, "null", null, layer])
            assert values[how, "mean_shift", null, ""] == pytest.approx(np.mean(shifts))
    # A layer is most like itself.
    assert [values["argmax", "null", "self", layer] for layer in "01"] == [1, 2]
    # With k = 1, the most similar layer is the soft alignment, and it is the matrix's own.
    own = np.array([float(row["cka"]) for row in matrix if row["matrix"] == "model"]).reshape(2, 2)
    assert [values["soft", "aligned", "", layer] for layer in "01"] == (own.argmax(0) + 1).tolist()
    assert {row["verdict"] for row in rows if row["quantity"] == "shift"} <= {"deeper", "shallower", "not resolved"}

    facts = json.loads((out / "provenance.json").read_text())
    assert facts["entities"]["used"] == facts["units"] == 90 and facts["entities"]["unaligned"] == 0
    assert facts["undefined"] == 0 and len(facts["runs"]) == 3
    listed = table(out / "entities.csv")
    assert listed[0]["entity"] == "people union" and len(listed) == 90


def test_every_token_of_documents(
    run_folder: Path, baseline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ("--checkpoint", run_folder, "--baseline", baseline_folder, "--positions", "all", "--tokens", 300)
    assert cka(*arguments, "--stream", 1, "--unit-norm", "--out", tmp_path) == 0
    rows = [row for row in table(tmp_path / "alignment.csv") if row["how"] == "soft" and row["quantity"] == "aligned"]
    means = [f"{float(row['mean']):.2f}" for row in rows]
    assert len(means) == 2 and f"a_j, from layer 1: {' '.join(means)}" in capsys.readouterr().out.splitlines()
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert 200 < facts["positions"] <= 300 and facts["entities"] is None and facts["units"] < 20
    assert not (tmp_path / "entities.csv").exists()


def test_unequal_layers_need_no_null(
    workplace: Path, run_folder: Path, entities: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tests.eval.conftest import _train

    deeper = _train(
        tiny_config(workplace, "deeper", **{"model.memory": "null", "model.num_layers": "3", "train.steps": "2"})
    )
    arguments = ("--checkpoint", run_folder, "--baseline", deeper, "--entities", entities, "--out", tmp_path)
    assert cka(*arguments) == 2
    assert "the models have 2 and 3 layers" in capsys.readouterr().err
    assert cka(*arguments, "--null", "none") == 0
    assert len(table(tmp_path / "cka.csv")) == 2 * 3
    rows = table(tmp_path / "alignment.csv")
    assert {row["quantity"] for row in rows} == {"aligned"} and len(rows) == 3 * 2
    assert all(1 <= float(row["mean"]) <= 3 for row in rows)
    assert "less" not in capsys.readouterr().out


def test_refusals(
    workplace: Path,
    run_folder: Path,
    baseline_folder: Path,
    entities: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    both = ("--checkpoint", run_folder, "--baseline", baseline_folder, "--out", tmp_path / "out")
    few = tmp_path / "few.txt"
    few.write_text("Rome\tplace\n\nParis\tplace\n")
    for arguments, message in (
        (("--checkpoint", run_folder, "--out", tmp_path), "name it with --baseline"),
        ((*both, "--entities", entities, "--positions", "all"), "leave one of them away"),
        ((*both, "--entities", few), "2 positions in a batch"),
        ((*both, "--entities", entities, "--batch", 4), "--batch 4: CKA of a batch needs 4 positions, its interval 5"),
        ((*both, "--entities", entities, "--stream", 2), "the model has 2 residual streams"),
        ((*both, "--entities", entities, "--stream", 0, "--point", "ffn_out"), "ffn_out has no residual streams"),
        ((*both, "--tokens", 300), "no entity found"),
        (
            ("--checkpoint", run_folder, run_folder / "step_000006", *both[2:], "--entities", entities),
            "2 checkpoints, but 1 baselines",
        ),
    ):
        assert cka(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_must_agree(
    run_folder: Path, entities: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tests.eval.conftest import _train, write_corpus

    write_corpus(tmp_path / "corpus", documents=60)
    config = tiny_config(tmp_path, "other", **{"train.steps": "1"})
    from engram.data.prepare import prepare

    prepare(config)
    arguments = ("--checkpoint", run_folder, "--baseline", _train(config), "--entities", entities)
    assert cka(*arguments, "--out", tmp_path / "out") == 2
    assert "Compare models of one tokenizer" in capsys.readouterr().err


def test_pairs_of_seeds() -> None:
    assert _pairs([0, 1], [2, 3, 4], "baseline") == {
        "model": [(2, 0), (3, 1)],
        "self": [(2, 2), (3, 3)],
        "seeds": [(3, 2), (4, 3)],
    }
    assert _pairs([0], [1], "baseline") == {"model": [(1, 0)], "self": [(1, 1)]}
    assert _pairs([0], [1], "none") == {"model": [(1, 0)]}
