"""Tasks that lm-eval lacks: prompts and right answers of hand-made rows, through lm-eval's own reading of the files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import completion, popqa
from eval.benchmarks.add import add_files
from eval.benchmarks.manifest import whole
from eval.suites.lm_tasks import OWN_TASKS, write_tasks
from tests.eval.benchmarks.test_data import C3, CCPM, POPQA, RACE, lines


def test_popqa_s_two_rules() -> None:
    doc = {"answers": ["New York", "NYC"]}
    for text, exact, contains in [
        (" New York", 1, 1),
        (" new york.", 1, 1),
        (" the city of New York, USA", 0, 1),
        ("nyc", 1, 1),
        (" Boston", 0, 0),
        (" NY", 0, 0),
        (" NEW YORK CITY", 0, 0),
    ]:
        assert popqa.process_results(doc, [text]) == {"exact_match": exact, "contains": contains}, text


def test_completions() -> None:
    found = completion.process_results({"answers": ["été", "b"]}, [(-3 * math.log(2), True)])
    # A space and é, t, é: six bytes.
    assert found == {"acc": 1.0, "bits_per_byte": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("name", "file", "text", "context", "continuations", "target"),
    [
        (
            "c3",
            "c3.yaml",
            json.dumps(C3),
            "男：你好。\n女：再见。\n问题：谁？\n答案：",
            ["男", "女", "我"],
            1,
        ),
        ("ccpm", "ccpm.yaml", lines(CCPM), "明月\n诗句：", ["床前", "明月", "光", "霜"], 1),
        (
            "race_middle",
            "race.yaml",
            lines([RACE]),
            "Article: Tom went home.\n\nQuestion: Who?\nAnswer:",
            [" Tom", " Ann", " Bob", " I"],
            0,
        ),
        (
            "mmlu_redux",
            "mmlu_redux.yaml",
            lines([{"question": " q", "choices": ["w", "x", "y", "z"], "answer": 2, "error_type": "ok"}]),
            "q\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            [" A", " B", " C", " D"],
            2,
        ),
        (
            "popqa",
            "popqa.yaml",
            POPQA,
            "Q: What is George Rankin's occupation? A:",
            None,
            "politician",
        ),
        (
            "qa_wikidata",
            "qa_wikidata.yaml",
            lines([{"id": 0, "prompt": "The genre of X is", "answers": ["rock"]}]),
            "The genre of X is",
            [" rock"],
            " rock",
        ),
    ],
)
def test_requests(
    name: str,
    file: str,
    text: str,
    context: str,
    continuations: list[str] | None,
    target: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    from datasets import config as datasets_config
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")

    original = tmp_path / "original"
    original.write_text(text, encoding="utf-8")
    add_files(tmp_path, name, [("test", original)], "none", "made up")
    manifest = whole(tmp_path / name)
    (local,) = write_tasks(tmp_path / "tasks", name, [OWN_TASKS / file], tmp_path / name, manifest, 0)
    task = TaskManager(include_defaults=False).load([str(local.path)])["tasks"][name]
    task.build_all_requests(limit=1)
    arguments = [one.args for one in task.instances]
    if continuations is None:
        assert [one[0] for one in arguments] == [context] and arguments[0][1]["until"] == ["\n"]
    else:
        assert arguments == [(context, one) for one in continuations]
    (doc,) = list(task.test_docs())[:1]
    assert task.doc_to_target(doc) == target
