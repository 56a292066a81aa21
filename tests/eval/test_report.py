"""The report of a real run: its numbers are the run's, and the page needs nothing but itself."""

import csv
import json
import re
import shutil
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from engram.config import UserError, load_config
from engram.model.accounting import count_parameters
from eval import ngram
from eval.report import loss_table, print_summary, run_names, write_report
from eval.runs import Run, read_run


@pytest.fixture(scope="module")
def report(run_folder: Path) -> tuple[Path, Run]:
    path, [run] = write_report([run_folder], device="cpu")
    return path, run


@pytest.fixture(scope="module")
def comparison(run_folder: Path, baseline_folder: Path) -> tuple[Path, list[Run]]:
    return write_report([run_folder, baseline_folder], device="cpu")


def text_of(path: Path) -> str:
    html = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", "\n", html))


def test_losses_are_the_runs(report: tuple[Path, Run], run_folder: Path, prepared_folder: Path) -> None:
    path, run = report
    assert run.result is not None and run.baselines is not None
    done = json.loads((run_folder / "done.json").read_text())
    assert run.result.loss == pytest.approx(done["val_loss"], abs=2e-6)
    assert run.baselines == ngram.measure(prepared_folder, 32, 320)
    assert run.result.targets == run.baselines.targets
    header, rows, strong = loss_table([run])
    assert strong == [0] and [row[0] for row in rows] == [
        "engram",
        *(
            f"{name} model"
            for name in sorted(("unigram", "bigram", "trigram"), key=lambda n: getattr(run.baselines, n))
        ),
    ]
    assert header[1:3] == ["nats / token", "bits / byte"]
    assert rows[0][1] == f"{run.result.loss:.4f}" and rows[0][2] == f"{run.result.bits_per_byte:.4f}"
    bigram = next(row for row in rows if row[0] == "bigram model")
    assert bigram[1] == f"{run.baselines.bigram:.4f}" and bigram[4] == f"{run.baselines.bigram - run.result.loss:+.3f}"
    text = text_of(path)
    for row in rows:
        assert all(cell in text for cell in row)


def test_page_stands_alone(report: tuple[Path, Run], run_folder: Path) -> None:
    path, _ = report
    assert path == run_folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|<link|<script|url\((?!#)", html)
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert len(re.findall(r'<path id="loss-', html)) and 'id="statistics_engram-' in html


def test_sections_and_facts(report: tuple[Path, Run], run_folder: Path) -> None:
    path, run = report
    text = text_of(path)
    for heading in ("Against n-gram models", "Training", "Inside the layers", "Memory gates", "Sample", "Parameters"):
        assert heading in text
    counts = count_parameters(run.config.model)
    for number in (counts.total, counts.activated, counts.memory, counts.vocabulary, *counts.roles.values()):
        assert f"{number:,}" in text
    code = json.loads((run_folder / "code.json").read_text())["starts"][0]
    assert code["torch"] in text and code["run_id"] in text
    assert "rows_per_head:" in text and "finished, step 12 of 12" in text
    assert run.sample is not None and run.sample in text and "the people" in text
    assert run.gates is not None and all(token in text for token in run.gates.tokens)


def test_figures_come_with_their_data(report: tuple[Path, Run], run_folder: Path) -> None:
    folder = run_folder / "report_figures"
    for name in ("loss", "schedule", "statistics_engram"):
        assert {path.suffix for path in folder.glob(f"{name}.*")} == {".png", ".pdf", ".svg", ".csv"}
    assert (folder / "gates_engram.csv").exists()
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "loss.csv").open()))
    for quantity in ("loss", "val_loss"):
        expected = [(line["step"], line["tokens"], line[quantity]) for line in metrics if quantity in line]
        found = [row for row in rows if row["quantity"] == quantity and row["run"] == "engram"]
        assert [(int(row["step"]), int(row["tokens"]), float(row["value"])) for row in found] == expected
    run = report[1]
    levels = {row["run"]: float(row["value"]) for row in rows if row["quantity"] == "n-gram model"}
    assert levels == {name: getattr(run.baselines, name) for name in ("unigram", "bigram", "trigram")}
    statistics = list(csv.DictReader((folder / "statistics_engram.csv").open()))
    keys = {key for line in metrics for key in line if key.startswith("layer_")}
    assert {row["quantity"] for row in statistics} == keys and keys


def test_measurements_are_reproducible(report: tuple[Path, Run], run_folder: Path) -> None:
    again = read_run(run_folder, "engram", device="cpu")
    assert again.sample == report[1].sample and again.result == report[1].result


def test_several_runs_side_by_side(comparison: tuple[Path, list[Run]], run_folder: Path) -> None:
    path, runs = comparison
    assert path == run_folder.parent / "comparison.html" and [run.name for run in runs] == ["engram", "moe"]
    assert runs[1].gates is None and runs[0].baselines == runs[1].baselines
    text = text_of(path)
    # What differs is listed with both values, what does not is not.
    assert "optim.lr" in text and "0.02" in text and "model.memory.num_heads" in text
    assert "optim.weight_decay" not in text
    _, rows, strong = loss_table(runs)
    assert strong == [0, 1] and len(rows) == 5
    best = min(run.result.loss for run in runs if run.result)
    assert runs[0].baselines is not None
    assert {row[4] for row in rows if row[0] == "unigram model"} == {f"{runs[0].baselines.unigram - best:+.3f}"}


def test_terminal_summary(comparison: tuple[Path, list[Run]]) -> None:
    path, runs = comparison
    out = StringIO()
    print_summary(runs, path, Console(file=out, width=200))
    text = out.getvalue()
    for run in runs:
        assert run.result is not None and f"{run.result.loss:.4f}" in text
        assert run.sample is not None and "the people" + run.sample in text
    assert "bigram model" in text and f"report: {path}" in text


def test_what_is_missing_is_said_not_hidden(run_folder: Path, tmp_path: Path) -> None:
    """A run whose data has moved away, and one that has no checkpoint yet."""
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved, symlinks=True)
    run = read_run(moved, "moved", data=str(tmp_path / "nowhere"), device="cpu")
    assert run.result is None and run.sample is not None
    assert f"The prepared data is not at {tmp_path / 'nowhere'}" in run.notes[0]
    for checkpoint in [*moved.glob("step_*")]:
        shutil.rmtree(checkpoint)
    (moved / "latest").unlink()
    (moved / "done.json").unlink()
    path, [run] = write_report([moved], device="cpu")
    assert run.sample is None and "There is no checkpoint yet" in text_of(path)
    assert "unfinished, step 12 of 12" in text_of(path)


def test_runs_of_one_name_are_told_apart() -> None:
    assert run_names([Path("runs/a"), Path("runs/b/")]) == ["a", "b"]
    assert run_names([Path("x/a/same"), Path("x/b/same")]) == ["a_same", "b_same"]
    assert run_names([Path("x/same"), Path("x/same")]) == ["run_0", "run_1"]


def test_not_a_run_folder(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_report([tmp_path])
    shutil.copy(run_folder / "config.yaml", tmp_path)
    load_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="has no metrics yet"):
        write_report([tmp_path])
