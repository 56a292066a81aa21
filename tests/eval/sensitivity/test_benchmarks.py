"""Benchmarks with the memory switched off: scores of a suite's tasks with their chance, asked of a changed model."""

import csv
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval")

from engram.config import UserError
from eval.__main__ import main
from eval.loading import load
from eval.sensitivity.benchmarks import SCORE, benchmark_suite
from eval.sensitivity.retained import Condition
from tests.eval.suites.test_settings import choices, rows


def test_scores_are_those_of_the_suite(run_folder: Path, tmp_path: Path) -> None:
    path = choices(tmp_path)
    assert main([str(path), "--checkpoint", str(run_folder), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    expected = {
        row["id"]: float(row["value"]) for row in rows(tmp_path / "out" / "items.csv") if row["metric"] == "acc"
    }
    asked = benchmark_suite(path, tmp_path / "asked", "cpu")
    loaded = load(run_folder, "cpu", threads=1)
    found = asked.items(loaded)
    assert {item.id: item.value for item in found} == expected and len(expected) == 4
    assert {(item.task, item.metric) for item in found} == {("mmlu_redux", SCORE)}
    assert asked.chance == {"mmlu_redux": 0.25} and asked.kinds == {"mmlu_redux": "knowledge"}
    # The changed model is asked anew.
    ran: list[int] = []
    handle = loaded.model.embed.register_forward_pre_hook(lambda *_: ran.append(1))
    with Condition("zero_embedding").applied(loaded, None):
        changed = asked.items(loaded)
    handle.remove()
    assert ran and [item.id for item in changed] == [item.id for item in found]


def test_the_command(run_folder: Path, tmp_path: Path) -> None:
    path, out = choices(tmp_path), tmp_path / "out"
    arguments = ["sensitivity", "--checkpoint", str(run_folder), "--suite", str(path), "--modes", "zero_embedding"]
    assert main([*arguments, "--tokens", "300", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    with open(out / "retained.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["task"], row["kind"], row["chance"], row["items"]) == ("mmlu_redux", "knowledge", "0.25", "4")
    assert "mmlu_redux" in (out / "sensitivity.html").read_text()
    assert not list(out.rglob("cache.sqlite"))


@pytest.mark.parametrize(
    ("task", "message"), [("perplexity", "it measures losses alone"), ("facts", "facts are asked by --tasks facts")]
)
def test_tasks_that_have_a_place_of_their_own(tmp_path: Path, task: str, message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": [{"task": task}]}))
    with pytest.raises(UserError, match=message):
        benchmark_suite(path, tmp_path, "cpu")
