"""The commands `logit_lens` and `depth`: tables that hold what was measured, figures, refusals."""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.config import UserError
from engram.report.figure import SavedFigure, to_csv
from engram.training.trainer import Trainer
from eval.commands import depth, logit_lens
from eval.depth import contributions as effective_depth
from eval.depth.tables import centre
from eval.lens.logit_lens import METRICS, measure
from eval.loading import load
from eval.sides import open_runs, read_texts
from tests.eval.conftest import tiny_config


def run(task: object, *arguments: object) -> None:
    parser = argparse.ArgumentParser()
    task.add_arguments(parser)
    task.run(parser.parse_args([str(argument) for argument in (*arguments, "--device", "cpu", "--tokens", 300)]))


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def deep_folder(workplace: Path, prepared_folder: Path) -> Path:
    """A run of another number of blocks."""
    config = tiny_config(
        workplace, "deep", **{"model.memory": "null", "model.num_layers": "3", "train.steps": "2", "eval.tokens": "64"}
    )
    assert Trainer(config).fit() == 0
    torch.set_flush_denormal(False)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def lens_folder(run_folder: Path, baseline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lens")
    both = [run_folder, run_folder / "step_000006"]
    rest = ["--baseline", baseline_folder, "--name", "memory", "--streams", "--tuned", 3, "--tau", 0.001]
    run(logit_lens, "--checkpoint", *both, *rest, "--out", out)
    return out


def test_lens_table_holds_what_was_measured(lens_folder: Path, run_folder: Path) -> None:
    table = read(lens_folder / "logit_lens.csv")
    runs, tokenizer = open_runs({"memory": [str(run_folder)]})
    found = measure(load(run_folder, "cpu").model, read_texts(runs, tokenizer, None, 300).documents)
    means = found.sums.sum(0) / found.counts.sum()
    mine = [row for row in table if row["run"] == str(runs[0].folder) and row["lens"] == "logit"]
    for place, values in zip(found.places, means, strict=True):
        for metric, value in zip(METRICS, values, strict=True):
            (row,) = [
                row for row in mine if (row["point"], row["stream"], row["metric"]) == (place.name, "merged", metric)
            ]
            assert float(row["mean"]) == pytest.approx(value, rel=1e-4, abs=1e-6)
            assert float(row["low"]) <= float(row["mean"]) + 1e-9 and float(row["mean"]) <= float(row["high"]) + 1e-9
            assert int(row["depth"]) == place.depth and float(row["depth_fraction"]) == place.depth / 2
            assert int(row["n_documents"]) == len(found.counts) and int(row["n_tokens"]) == found.counts.sum()
    assert {row["stream"] for row in table} == {"merged", "0", "1"}
    assert {row["point"] for row in mine} == {"embedding", "memory 0", "block 0", "memory 1", "block 1"}
    assert {row["lens"] for row in table} == {"logit", "tuned"}
    # Differences are of the places that both models have.
    differences = [row for row in table if row["model"] == "memory - baseline" and row["lens"] == "logit"]
    assert {row["point"] for row in differences} == {"embedding", "block 0", "block 1"}
    assert {row["resolved"] for row in differences} <= {"in these runs", "no"}
    side = {
        model: float(row["mean"])
        for row in table
        for model in [row["model"]]
        if (row["run"], row["lens"], row["point"], row["metric"], row["stream"])
        == ("all", "logit", "block 0", "cross_entropy", "merged")
    }
    assert side["memory - baseline"] == pytest.approx(side["memory"] - side["baseline"])


def test_lens_scalars_figures_and_provenance(lens_folder: Path) -> None:
    table = read(lens_folder / "scalars.csv")
    assert {row["scalar"] for row in table} == {"depth_tau", "depth_half", "crossing_half", "area"}
    assert {row["model"] for row in table} == {"memory", "baseline", "memory - baseline"}
    for name in ("logit_lens", "streams"):
        for ending in ("png", "pdf", "svg", "csv"):
            assert (lens_folder / f"{name}.{ending}").stat().st_size > 100
    page = (lens_folder / "logit_lens.html").read_text()
    assert "own final distribution" in page and "Single streams" in page and "http" not in page.split("</style>")[1]
    facts = json.loads((lens_folder / "provenance.json").read_text())
    assert facts["settings"]["tau"] == 0.001 and [one["step"] for one in facts["runs"]] == [12, 6, 12]


def save_table(figure: object, data: dict[str, list[object]], folder: Path, name: str) -> SavedFigure:
    """Drawing takes most of a command's time."""
    (folder / f"{name}.csv").write_text(to_csv(data))
    return SavedFigure(name, "", "")


def test_unequal_depths_are_compared_as_shares(
    run_folder: Path, deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.lens.page.save", save_table)
    monkeypatch.setattr("eval.depth.page.save", save_table)
    run(logit_lens, "--checkpoint", run_folder, "--baseline", deep_folder, "--out", tmp_path)
    curves, table = read(tmp_path / "logit_lens.csv"), read(tmp_path / "scalars.csv")
    assert not any(row["model"] == "model - baseline" for row in curves)
    found = {(row["model"], row["scalar"], row["run"] == "all"): row for row in table}
    for name in ("crossing_half", "depth_half"):
        parts = [float(found[side, name, True]["mean"]) for side in ("model", "baseline")]
        difference = found["model - baseline", name, True]
        assert float(difference["mean"]) == pytest.approx(parts[0] / 2 - parts[1] / 3) and difference["unit"] == "share"
    assert "unequal numbers of blocks" in (tmp_path / "logit_lens.html").read_text()
    run(depth, "--checkpoint", run_folder, "--baseline", deep_folder, "--out", tmp_path / "depth")
    assert "unequal numbers of blocks" in (tmp_path / "depth/depth.html").read_text()


def test_depth_command(run_folder: Path, baseline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(depth, "--checkpoint", run_folder, "--baseline", baseline_folder, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert "skipped_centre" in shown and "crossing_half" in shown and "model - baseline" in shown
    # The tests' corpus has no names in it.
    assert "alignment: not measured: no entity found" in shown
    runs, tokenizer = open_runs({"model": [str(run_folder)]})
    found = effective_depth.measure(load(run_folder, "cpu").model, read_texts(runs, tokenizer, None, 300).documents)
    mine = [row for row in read(tmp_path / "depth.csv") if row["run"] == str(runs[0].folder)]
    kl = found.skipped_kl.sum(0) / found.counts.sum()
    assert [float(row["mean"]) for row in mine if row["measure"] == "skipped_kl"] == pytest.approx(
        kl, rel=1e-4, abs=1e-6
    )
    (change,) = [row for row in mine if row["measure"] == "change"]
    assert (change["layer"], change["later"]) == ("0", "1")
    assert float(change["mean"]) == pytest.approx(found.change[:, 0, 1].sum() / found.counts.sum(), rel=1e-4)
    sizes = [float(row["mean"]) for row in mine if (row["measure"], row["part"]) == ("size", "memory")]
    index = [at for at, part in enumerate(found.parts) if part.name == "memory"]
    assert sizes == pytest.approx(found.size[:, index].sum(0) / found.counts.sum(), rel=1e-4)
    centres = {
        row["scalar"]: float(row["mean"]) for row in read(tmp_path / "scalars.csv") if row["run"] == str(runs[0].folder)
    }
    assert centres["skipped_centre"] == pytest.approx((0.5 * kl[0] + 1.5 * kl[1]) / kl.sum(), rel=1e-4)
    for name in ("depth", "measures"):
        for ending in ("png", "pdf", "svg", "csv"):
            assert (tmp_path / f"{name}.{ending}").stat().st_size > 100
    page = (tmp_path / "depth.html").read_text()
    for measure_name in ("Lens", "Alignment", "Skipped blocks", "Contributions"):
        assert f"<h3>{measure_name}</h3>" in page


def test_centre_of_mass() -> None:
    np.testing.assert_allclose(centre(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]])), [2.0, 3.5])
    assert np.isnan(centre(np.zeros(3)))


def test_wrong_options(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run(logit_lens, "--checkpoint", run_folder, "--out", tmp_path / "file")
    with pytest.raises(UserError, match="both sides are called 'x'"):
        names = ["--name", "x", "--baseline-name", "x", "--out", tmp_path]
        run(depth, "--checkpoint", run_folder, "--baseline", run_folder, *names)
    for wrong in (["--tau", "-1"], ["--level", "1"]):
        with pytest.raises(SystemExit):
            run(logit_lens, "--checkpoint", run_folder, "--out", tmp_path, *wrong)
