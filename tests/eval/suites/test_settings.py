"""Suites: mistakes in their files, what a run leaves behind, comparisons, series, and several processes."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from engram.config import ConfigError, UserError
from engram.training.files import sha256
from engram.training.metrics import read_metrics
from eval.__main__ import main
from eval.benchmarks.add import add_files
from eval.benchmarks.sandbox import check_available
from eval.loading import load
from eval.suites import check
from eval.suites.run import checkpoints
from eval.suites.settings import load_suite

ROOT = Path(__file__).parents[3]


def write(path: Path, *tasks: dict, **settings: object) -> Path:
    path.write_text(yaml.safe_dump({"tasks": list(tasks), **settings}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "perplexty"}], "tasks.0: there is no task 'perplexty': did you mean 'perplexity'?"),
        ([{"task": "mmul"}], "did you mean 'mmlu'?"),
        ([{"task": "triviaqa_zh"}], "cannot be run: a translation that was never published"),
        ([{"task": "pile"}], "losses on texts are measured by task perplexity"),
        ([{"task": "mmlu", "shot": 5}], "tasks.0.shot: unknown key .*did you mean 'shots'"),
        ([{"task": "mmlu", "shots": -1}], "tasks.0.shots: is -1, but must be 0 or more"),
        ([{"task": "mmlu", "lengths": [64]}], "task mmlu has no lengths"),
        ([{"task": "ruler", "shots": 3}], "task ruler has no shots"),
        ([{"task": "perplexity", "profile": "full"}], "task perplexity has no profile"),
        ([{"task": "ruler", "profile": "big"}], "tasks.0.profile: is 'big', but must be 'tiny' or 'full'"),
        ([{"task": "perplexity", "shots": 3}], "task perplexity has no shots"),
        ([{"task": "mmlu"}, {"task": "mmlu", "shots": 0}], "two tasks are called 'mmlu'.*another `name`"),
        ([], "must be a list of 1 or more"),
    ],
)
def test_mistakes_in_a_suite(tasks: list[dict], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "suite.yaml", *tasks)
    with pytest.raises(ConfigError, match=message):
        load_suite(path)
    assert main([str(path), "--checkpoint", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_a_task_of_any_name_with_its_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "suite.yaml", {"task": "anything", "yaml": "piqa/piqa.yaml", "data": "x"}, level=0.9)
    assert load_suite(path).tasks[0].yaml == "piqa/piqa.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_loads_and_opens_with_its_command(path: Path) -> None:
    load_suite(path)
    text = path.read_text(encoding="utf-8")
    assert f"python -m eval configs/eval/{path.name}" in text and "# Cost:" in text and "# Expected:" in text


@pytest.fixture(scope="module")
def ran(run_folder: Path, baseline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses at two lengths, of the last two checkpoints, beside a baseline."""
    out = tmp_path_factory.mktemp("suite")
    suite = write(out / "suite.yaml", {"task": "perplexity", "lengths": [16, 32], "tokens": 320}, level=0.9)
    sides = ["--checkpoint", str(run_folder), "--baseline", str(baseline_folder), "--last", "2"]
    assert main([str(suite), *sides, "--out", str(out / "out"), "--device", "cpu", "--threads", "1"]) == 0
    return out / "out"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_loss_is_the_run_s_validation_loss(ran: Path, run_folder: Path) -> None:
    found = {(row["task"], row["metric"]): float(row["value"]) for row in rows(ran / "metrics.csv")}
    done = json.loads((run_folder / "done.json").read_text())
    assert found["perplexity@32", "loss"] == pytest.approx(done["val_loss"], abs=2e-6)
    assert found["perplexity@32", "perplexity"] == pytest.approx(math.exp(done["val_loss"]), rel=1e-5)


def test_document_losses_by_hand(ran: Path, run_folder: Path, prepared_folder: Path) -> None:
    from eval.documents import read_documents
    from eval.loading import open_split

    loaded = load(run_folder, "cpu", threads=1)
    documents = read_documents(open_split(prepared_folder, loaded.tokenizer), 16, 320)
    found = [float(row["value"]) for row in rows(ran / "items.csv") if row["task"] == "perplexity@16"]
    assert len(found) == len(documents) > 5
    for document, value in zip(documents, found, strict=True):
        # Nothing is scored before the first token, as in training.
        row = torch.tensor([document])
        with torch.no_grad():
            logprobs = loaded.model(row)[0, :-1].double().log_softmax(-1)
        assert value == pytest.approx(-float(logprobs.gather(1, row[0, 1:, None]).mean()), abs=1e-4)


def test_a_tidy_table_tells_where_each_number_came_from(ran: Path, run_folder: Path) -> None:
    table = pq.read_table(ran / "metrics.parquet").to_pylist()
    (one,) = [row for row in table if (row["task"], row["metric"]) == ("perplexity@16", "document_loss")]
    assert one["low"] < one["value"] < one["high"] and one["step"] == 12 and one["level"] == 0.9
    assert one["checkpoint"] == str(run_folder / "step_000012") and len(one["checkpoint_sha256"]) == 64
    last = read_metrics(run_folder / "metrics.jsonl")[-1]
    assert (one["tokens"], one["val_loss"]) == (last["tokens"], last["val_loss"])
    assert one["config_sha256"] == sha256(run_folder / "step_000012" / "config.yaml")
    provenance = json.loads((ran / "provenance.json").read_text())
    assert (
        provenance["suite"]["tasks"][0]["lengths"] == [16, 32] and provenance["checkpoint"] == one["checkpoint_sha256"]
    )
    theirs = json.loads((ran / "baseline" / "provenance.json").read_text())
    assert theirs["checkpoint"] != provenance["checkpoint"]


def test_the_comparison_is_paired_by_document(ran: Path) -> None:
    ours, theirs = (rows(path / "items.csv") for path in (ran, ran / "baseline"))
    (one,) = [row for row in rows(ran / "comparison.csv") if row["task"] == "perplexity@32"]
    pairs = [
        float(a["value"]) - float(b["value"])
        for a, b in zip(ours, theirs, strict=True)
        if a["task"] == "perplexity@32" and a["id"] == b["id"]
    ]
    assert float(one["difference"]) == pytest.approx(sum(pairs) / len(pairs)) and int(one["n"]) == len(pairs)
    low, high = float(one["low"]), float(one["high"])
    # Of a loss, less is better.
    assert one["verdict"] == ("better" if high < 0 else "worse" if low > 0 else "not resolved")
    assert {path.suffix for path in ran.glob("comparison.*")} == {".csv", ".png", ".pdf", ".svg"}


def test_the_series_over_the_last_checkpoints(ran: Path) -> None:
    series = [row for row in rows(ran / "series.csv") if row["task"] == "perplexity@32"]
    assert [(row["model"], row["step"]) for row in series] == [
        ("model", "6"),
        ("model", "12"),
        ("baseline", "6"),
        ("baseline", "12"),
    ]
    early = rows(ran / "steps" / "step_000006" / "metrics.csv")
    loss = next(float(row["value"]) for row in early if (row["task"], row["metric"]) == ("perplexity@32", "loss"))
    assert float(series[0]["value"]) == pytest.approx(loss)
    a, b = float(series[0]["value"]), float(series[1]["value"])
    assert float(series[0]["step_noise"]) == pytest.approx(abs(a - b) / math.sqrt(2))
    page = (ran / "index.html").read_text()
    assert "Paired comparison" in page and "Last checkpoints" in page and "http" not in page


def test_the_last_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    assert [path.name for path in checkpoints(run_folder, 2)] == ["step_000006", "step_000012"]
    assert checkpoints(run_folder / "step_000006", 1) == [run_folder / "step_000006"]
    with pytest.raises(UserError, match="has 2 checkpoints, but --last asks for 3"):
        checkpoints(run_folder, 3)
    with pytest.raises(UserError, match="has 0 checkpoints"):
        checkpoints(run_folder / "step_000006", 2)


def problems(tmp_path: Path) -> Path:
    """Two problems: nobody solves the first, everybody the second."""
    head = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 2\n"}
    easy = {"prompt": "", "entry_point": "len", "test": "def check(f):\n    pass\n"}
    easy["prompt"] = "x = 0\n'''\n"
    solved = {**easy, "test": "'''\ndef check(f):\n    pass\n"}
    original = tmp_path / "original.jsonl"
    original.write_text("\n".join(json.dumps({"task_id": f"T/{n}", **row}) for n, row in enumerate((head, solved))))
    add_files(tmp_path / "data", "humaneval", [("test", original)], "MIT", "made up")
    return write(
        tmp_path / "code.yaml",
        {"task": "humaneval", "max_length": 48, "allow_truncation": True},
        data=str(tmp_path / "data"),
    )


def test_programs_run_only_where_it_is_allowed(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    suite = problems(tmp_path)
    arguments = [str(suite), "--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    assert "allow it with --run-code" in capsys.readouterr().err
    try:
        check_available()
    except UserError as error:
        pytest.skip(str(error))
    assert main([*arguments, "--run-code"]) == 0
    assert [(row["id"], float(row["value"])) for row in rows(tmp_path / "out" / "items.csv")] == [
        ("T/0", 0),
        ("T/1", 1),
    ]
    (samples,) = (tmp_path / "out").glob("samples_humaneval_*.jsonl")
    first, _ = map(json.loads, samples.read_text().splitlines())
    assert not first["passed"] and first["reason"]


def choices(tmp_path: Path) -> Path:
    """Four questions in MMLU-Redux' form, and the suite that asks them."""
    original = tmp_path / "original.jsonl"
    asked = [
        {"question": f"the people of {n}", "choices": ["a", "b", "c", "d"], "answer": n, "error_type": "ok"}
        for n in range(4)
    ]
    original.write_text("\n".join(map(json.dumps, asked)))
    add_files(tmp_path / "data", "mmlu_redux", [("test", original)], "CC", "made up")
    entry = {"task": "mmlu_redux", "shots": 0, "max_length": 128}
    return write(tmp_path / "suite.yaml", entry, data=str(tmp_path / "data"))


def test_a_benchmark_from_its_data_to_the_table(
    run_folder: Path, baseline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("lm_eval")
    suite, out = choices(tmp_path), tmp_path / "out"
    arguments = [str(suite), "--checkpoint", str(run_folder), "--baseline", str(baseline_folder), "--device", "cpu"]
    assert main([*arguments, "--out", str(out)]) == 0
    table = pq.read_table(out / "metrics.parquet").to_pylist()
    (accuracy,) = [row for row in table if row["metric"] == "acc"]
    assert accuracy["n"] == 4 and accuracy["num_shots"] == 0 and accuracy["num_truncated"] == 0
    assert len(accuracy["data_sha256"]) == 64 and accuracy["lm_eval_version"]
    assert {"acc", "margin", "gold_bits_per_byte"} == {row["metric"] for row in rows(out / "comparison.csv")}
    assert len(list(out.glob("results_*.json"))) == len(list(out.glob("samples_mmlu_redux_*.jsonl"))) == 1
    with open(tmp_path / "data" / "mmlu_redux" / "test.jsonl", "a") as file:
        file.write("\n")
    assert main([*arguments, "--out", str(out)]) == 2
    assert "nothing is evaluated on altered data" in capsys.readouterr().err


def test_a_task_that_fails_leaves_the_others(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("lm_eval")
    entries = yaml.safe_load(choices(tmp_path).read_text())["tasks"]
    texts = {"task": "perplexity", "lengths": [16], "tokens": 160}
    short, again = (
        {**entries[0], "name": name, **more} for name, more in (("short", {"max_length": 4}), ("again", {}))
    )
    suite = write(tmp_path / "s.yaml", *entries, short, again, texts, data=str(tmp_path / "data"))
    out = tmp_path / "out"
    assert main([str(suite), "--checkpoint", str(run_folder), "--device", "cpu", "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "1 task was not measured; what is said of the others stands" in told
    assert "task short: a request needs" in told
    assert {row["task"] for row in rows(out / "metrics.csv")} == {"mmlu_redux", "again", "perplexity@16"}
    assert "short was not measured" in (out / "index.html").read_text()
    # One file has the tables of all that lm-eval ran.
    (path,) = out.glob("results_*.json")
    results = json.loads(path.read_text())
    assert set(results["results"]) == set(results["configs"]) == {"mmlu_redux", "again"}


def test_what_was_refused_leaves_nothing(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("lm_eval")
    entry = yaml.safe_load(choices(tmp_path).read_text())["tasks"][0]
    suite = write(tmp_path / "s.yaml", {**entry, "max_length": 4}, data=str(tmp_path / "data"))
    out = tmp_path / "out"
    arguments = [str(suite), "--checkpoint", str(run_folder), "--device", "cpu", "--out", str(out)]
    assert main(arguments) == 2
    assert "a request needs" in capsys.readouterr().err and not out.exists()
    # What was there before stays.
    (out / "tasks").mkdir(parents=True)
    assert main(arguments) == 2
    assert (out / "tasks").exists() and not (out / "cache.sqlite").exists()


def test_reading_beyond_the_training_is_told(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out", ["--checkpoint", str(run_folder), "--device", "cpu"]
    suite = write(tmp_path / "s.yaml", {"task": "perplexity", "lengths": [16, 48], "tokens": 320})
    assert main([str(suite), *run, "--out", str(out)]) == 0
    beyond = f"48 tokens are read at once, but {run_folder / 'step_000012'} was trained on 32"
    assert f"warning: perplexity: {beyond}" in capsys.readouterr().err
    assert beyond in (out / "index.html").read_text()
    assert beyond in json.loads((out / "provenance.json").read_text())["warnings"][0]
    assert main(["perplexity", *run, "--sequence-length", "48", "--tokens", "320"]) == 0
    assert f"warning: {beyond}" in capsys.readouterr().err
    assert main(["perplexity", *run, "--tokens", "320"]) == 0
    assert "warning" not in capsys.readouterr().err
    text = "the people of union states congress shall have power to lay and collect taxes for common defence " * 2
    assert main(["gates", *run, "--text", text, "--out", str(tmp_path / "gates.html")]) == 0
    assert "tokens are read at once" in capsys.readouterr().err
    assert "positions beyond are new" in (tmp_path / "gates.html").read_text()


def test_models_of_different_tokenizers_are_not_compared_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: str) -> Any:
        config = SimpleNamespace(data=SimpleNamespace(path=f"data/{path}"))
        return SimpleNamespace(folder=path, config=config, tokenizer=lambda: SimpleNamespace(digest=path[:3]))

    monkeypatch.setattr(check, "open_checkpoint", opened)
    for task, compared in (("perplexity", True), ("ruler", True), ("facts", False)):
        suite = load_suite(write(tmp_path / "suite.yaml", {"task": task}))
        # All read what the first one was trained on.
        assert check.check_texts(suite, ["one 1", "one 2"]) == "data/one 1"
        if compared:
            with pytest.raises(UserError, match=f"one 1 and two 2 have different tokenizers: {task} compare token"):
                check.check_texts(suite, ["one 1", "two 2"])
        else:
            check.check_texts(suite, ["one 1", "two 2"])


def test_without_lm_eval(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("eval.suites.lm_tasks.find_spec", lambda name: None)
    suite = choices(tmp_path)
    assert main([str(suite), "--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "lm-eval is missing: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_one_folder(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    suite = choices(tmp_path)
    arguments = ["-m", "eval", str(suite), "--checkpoint", str(run_folder), "--device", "cpu", "--threads", "1"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main([*arguments[2:], "--out", str(alone)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, *arguments, "--out", str(together)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = rows(alone / "items.csv"), rows(together / "items.csv")
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["value"]) == pytest.approx(float(b["value"]), abs=1e-4)
    assert len(list(together.glob("results_*.json"))) == 1
