"""What a suite needs is asked for before anything is computed, and all of it at once."""

import json
from pathlib import Path

import pytest

from engram.config import UserError
from eval.__main__ import main
from eval.benchmarks.add import add_files
from eval.suites.check import check_suite
from eval.suites.settings import load_suite
from tests.eval.suites.test_settings import ROOT, write


def test_all_that_is_missing_in_one_message(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's suite on an empty folder: 26 of its tasks need data, its losses do not."""
    path = ROOT / "configs" / "eval" / "paper.yaml"
    suite = load_suite(path).replace(data=tmp_path / "empty")
    with pytest.raises(UserError) as raised:
        check_suite(suite, run_code=True)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{len(suite.tasks) - 1} of {len(suite.tasks)} tasks have no data in {tmp_path / 'empty'}:"
    named = [line.split(":")[0].strip() for line in lines[1:-1]]
    assert named == [entry.title for entry in suite.tasks if entry.task != "perplexity"]
    assert "  mmlu: python -m eval add-data mmlu (2.1 MB)" in lines
    assert "  arc_easy: bring its files: python -m eval add-data arc_easy --file SPLIT=FILE" in lines
    own = write(tmp_path / "own.yaml", {"task": "perplexity"}, {"task": "piqa"}, data=str(tmp_path / "empty"))
    assert main([str(own), "--checkpoint", str(run_folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: 1 of 2 tasks have no data") and not (tmp_path / "out").exists()


def test_data_that_is_there_is_not_missing(tmp_path: Path) -> None:
    original = tmp_path / "original.jsonl"
    row = {"prompt": "def f():", "entry_point": "f", "test": "", "task_id": "T/0"}
    original.write_text(json.dumps(row))
    add_files(tmp_path / "data", "humaneval", [("test", original)], "MIT", "made up")
    suite = load_suite(write(tmp_path / "suite.yaml", {"task": "humaneval"}, data=str(tmp_path / "data")))
    check_suite(suite, run_code=True)
    with pytest.raises(UserError, match="allow it with --run-code"):
        check_suite(suite, run_code=False)
    with pytest.raises(UserError, match="essay.txt: cannot be read"):
        ruler = {"task": "ruler", "essay": str(tmp_path / "essay.txt")}
        check_suite(load_suite(write(tmp_path / "ruler.yaml", ruler)), run_code=False)
    # An entry with data of its own does not look into the suite's folder.
    elsewhere = {"task": "humaneval", "data": str(tmp_path / "data" / "humaneval")}
    own = load_suite(write(tmp_path / "own.yaml", elsewhere, data=str(tmp_path / "empty")))
    check_suite(own, run_code=True)
    with open(tmp_path / "data" / "humaneval" / "test.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="nothing is evaluated on altered data"):
        check_suite(own, run_code=True)


def test_tasks_of_the_models_own_data_need_none(run_folder: Path, tmp_path: Path) -> None:
    tasks = [{"task": "perplexity"}, {"task": "facts"}, {"task": "ruler"}]
    long_ppl = {"task": "long_ppl", "evaluator": str(run_folder)}
    suite = write(tmp_path / "suite.yaml", *tasks, long_ppl, data=str(tmp_path / "empty"))
    check_suite(load_suite(suite), run_code=False)
    gone = {**long_ppl, "evaluator": str(tmp_path / "gone")}
    with pytest.raises(UserError, match="gone"):
        check_suite(load_suite(write(suite, *tasks, gone)), run_code=False)
