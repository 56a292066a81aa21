"""Our models behind lm-eval: log-probabilities and texts by hand, splits, windows, lengths, and the cache."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from engram.config import UserError
from eval.benchmarks.manifest import read_manifest
from eval.loading import Loaded, load
from eval.results import Item, summarise
from eval.score_cache import ScoreCache
from eval.scoring import score
from eval.suites import harness
from eval.suites.harness import EngramLM, Origin
from eval.suites.lm_run import answer_items, corpus_metrics, items_of, run_tasks, write_lm_eval_files
from eval.suites.lm_tasks import LocalTask, lm_eval_tasks, task_files, write_tasks

PAIRS = [
    ("the people of", " union"),
    ("the people of", " states congress"),
    ("the people of ", "union"),
    ("", "the people"),
    ("café", " & No"),
]


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> Loaded:
    return load(run_folder, "cpu", threads=1)


@pytest.fixture(scope="module")
def other(baseline_folder: Path) -> Loaded:
    return load(baseline_folder, "cpu", threads=1)


def adapter(loaded: Loaded, path: Path | None = None, **settings: Any) -> EngramLM:
    return EngramLM(loaded, ScoreCache(path, loaded), **settings)


def instances(kind: str, arguments: list[tuple[Any, ...]], task: str = "t") -> list[Instance]:
    return [Instance(kind, {}, one, 0, metadata=(task, place, 1)) for place, one in enumerate(arguments)]


def by_hand(loaded: Loaded, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = loaded.model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1].double()
    targets = torch.tensor(continuation)
    found = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(found), bool((logits.argmax(-1) == targets).all())


def test_loglikelihood_by_hand(loaded: Loaded) -> None:
    lm, encode = adapter(loaded), loaded.tokenizer.encode
    found = lm.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        kept = context.rstrip()
        whole, given = encode(context + continuation), encode(kept)
        expected = by_hand(loaded, given or [loaded.tokenizer.eos_id], whole[len(given) :])
        assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    # A space at the end of the context belongs to the answer.
    assert found[2] == found[0]
    assert lm.counts.requests == {"t": 5} and lm.counts.truncated == {} and not lm.counts.merged["t"]


def test_the_split_is_that_of_lm_eval(loaded: Loaded) -> None:
    """Where the boundary falls between tokens; and in every case both parts together are the whole text."""
    lm = adapter(loaded)
    for context, continuation in PAIRS:
        ((given, scored),) = lm._encode_pairs([Origin("t", 0)], [(context, continuation)])
        if context:
            assert (given, scored) == lm._encode_pair(context, continuation)
            assert given + scored == loaded.tokenizer.encode(context + continuation)


def test_boundaries_inside_a_token_are_counted(loaded: Loaded) -> None:
    """Cut inside a token, the context's own tokens are not those of the whole text."""
    lm, encode = adapter(loaded), loaded.tokenizer.encode
    texts = [(text[:cut], text[cut:]) for text in ("the people of union",) for cut in range(1, len(text))]
    inside = [pair for pair in texts if encode("".join(pair))[: len(encode(pair[0]))] != encode(pair[0])]
    assert 0 < len(inside) < len(texts)
    for given, scored in lm._encode_pairs([Origin("t", 0)] * len(inside), inside):
        assert scored and given + scored == encode("the people of union")
    assert lm.counts.merged["t"] == len(inside)


def test_long_texts_window_by_window(loaded: Loaded) -> None:
    """The windows of lm-eval; with half of the length as history, no n-gram after the first window is blind."""
    text = "the people of union states congress shall have power to lay and collect taxes " * 3
    ids = loaded.tokenizer.encode(text)
    assert len(ids) > 40
    for context in (1, 8):
        lm = adapter(loaded, max_length=16, rolling_context=context)
        (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        expected = 0.0
        for inputs, targets in get_rolling_token_windows(ids, loaded.tokenizer.eos_id, 16, context):
            with torch.no_grad():
                logprobs = loaded.model(torch.tensor([inputs]))[0].double().log_softmax(-1)
            last = logprobs[-len(targets) :]
            expected += float(last.gather(1, torch.tensor(targets)[:, None]).sum())
        assert found == pytest.approx(expected, abs=1e-3)
    whole = adapter(loaded, max_length=len(ids)).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert whole[0] == pytest.approx(by_hand(loaded, [loaded.tokenizer.eos_id], ids)[0], abs=1e-3)


def test_generation_stops_at_the_first_stop_string(loaded: Loaded) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 12}
    asked = instances("generate_until", [("the people", settings), ("of union states", settings)])
    free = adapter(loaded).generate_until(asked)
    stop = free[0][3:5]
    stopped = adapter(loaded).generate_until(instances("generate_until", [("the people", {**settings, "until": stop})]))
    assert stopped == [free[0].split(stop)[0]] and len(free[0]) > 5


def test_repeated_samples_differ(loaded: Loaded) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    texts = adapter(loaded).generate_until(instances("generate_until", [("the people", settings)] * 3))
    assert len(set(texts)) == 3


def test_too_long_is_an_error_unless_cutting_is_allowed_and_counted(loaded: Loaded) -> None:
    context, answer = "the people of union states congress shall have power", " taxes"
    asked = instances("loglikelihood", [(context, answer), ("t", "h")], task="long")
    with pytest.raises(UserError, match="task long: a request needs .* max_length is 8: use fewer shots"):
        adapter(loaded, max_length=8).loglikelihood(asked)
    lm = adapter(loaded, max_length=8, allow_truncation=True)
    (found, _) = lm.loglikelihood(asked)
    whole, given = loaded.tokenizer.encode(context + answer), loaded.tokenizer.encode(context)
    scored = whole[len(given) :]
    kept = given[-(8 - (len(scored) - 1)) :]
    assert found[0] == pytest.approx(by_hand(loaded, kept, scored)[0], abs=1e-4)
    assert lm.counts.truncated == {"long": {0}} and lm.counts.requests == {"long": 2}
    # Two choices of one question are one that was cut.
    choices = [Instance("loglikelihood", {}, (context, text), 0, metadata=("c", 3, 1)) for text in (" a", " b")]
    lm.loglikelihood(choices)
    assert lm.counts.truncated["c"] == {3}
    with pytest.raises(UserError, match="even the answer alone"):
        adapter(loaded, max_length=2, allow_truncation=True).loglikelihood(asked)
    with pytest.raises(UserError, match="task t: a request needs"):
        adapter(loaded, max_length=8).generate_until(instances("generate_until", [("the people", {})]))


def test_the_cache_answers_once_for_each_checkpoint(loaded: Loaded, other: Loaded, tmp_path: Path) -> None:
    path, asked = tmp_path / "cache.sqlite", instances("loglikelihood", PAIRS)
    first = adapter(loaded, path).loglikelihood(asked)
    ran: list[int] = []
    handle = loaded.model.embed.register_forward_pre_hook(lambda *_: ran.append(1))
    lm = adapter(loaded, path)
    assert lm.loglikelihood(asked) == first and not ran
    assert lm.loglikelihood(instances("loglikelihood", [("the", " people")])) and ran
    handle.remove()
    theirs = adapter(other, path).loglikelihood(asked)
    assert theirs == adapter(other).loglikelihood(asked)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(first, theirs, strict=True))


@pytest.mark.parametrize("answer", ["null", "[]", '"x"', "[NaN, true]"])
def test_a_cache_that_holds_something_else(loaded: Loaded, tmp_path: Path, answer: str) -> None:
    path, asked = tmp_path / "cache.sqlite", instances("loglikelihood", PAIRS)
    adapter(loaded, path).loglikelihood(asked)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET answer = ?", (answer,))
    with pytest.raises(UserError, match="the cache holds .*, which is no answer: delete it"):
        adapter(loaded, path).loglikelihood(asked)


def test_what_an_interrupted_evaluation_has_answered_is_kept(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "cache.sqlite", instances("loglikelihood", PAIRS)
    expected = adapter(loaded).loglikelihood(asked)
    monkeypatch.setitem(harness.KEPT_AT_ONCE, "loglikelihood", 2)
    scored: list[int] = []

    def interrupted(model: Any, requests: Any, **settings: Any) -> Any:
        if scored == [2]:
            raise KeyboardInterrupt
        scored.append(len(requests))
        return score(model, requests, **settings)

    monkeypatch.setattr(harness, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter(loaded, path).loglikelihood(asked)
    scored.clear()
    monkeypatch.setattr(
        harness, "score", lambda *given, **settings: scored.append(len(given[1])) or score(*given, **settings)
    )
    again = adapter(loaded, path).loglikelihood(asked)
    # Of five, two are one question, which was answered with another one.
    assert scored == [2]
    assert [logprob for logprob, _ in again] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)


# ------------------------------------------------------------------------------------------------ whole tasks, offline

ROWS = [
    {"question": "the people of", "choices": ["union", "states congress"], "answer": 0},
    {"question": "shall have", "choices": ["power to", "taxes", "defence"], "answer": 2},
    {"question": "lay and collect", "choices": ["the", "common"], "answer": 1},
]
TASK = """
task: invented
dataset_path: somewhere/on-a-hub
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def local(tmp_path: Path) -> Callable[[int], list[LocalTask]]:
    from eval.benchmarks.add import add_files

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    add_files(tmp_path / "data", "invented", [("test", rows), ("dev", rows)], "none", "made up")
    task = tmp_path / "invented.yaml"
    task.write_text(TASK)
    data = tmp_path / "data" / "invented"
    return lambda shots: write_tasks(tmp_path / "tasks", "invented", [task], data, read_manifest(data), shots)


def test_a_task_of_lm_eval_on_local_data(
    loaded: Loaded, local: Callable[[int], list[LocalTask]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lm, tasks = adapter(loaded, max_length=64), local(0)
    found = run_tasks(lm, tasks, None)
    assert capsys.readouterr() == ("", "")
    right, margins = [], []
    for row in ROWS:
        given = loaded.tokenizer.encode(f"Q: {row['question']}\nA:")
        texts = [loaded.tokenizer.encode(f"Q: {row['question']}\nA: {choice}") for choice in row["choices"]]
        logprobs = [by_hand(loaded, given, text[len(given) :])[0] for text in texts]
        gold = logprobs.pop(row["answer"])
        right.append(float(gold > max(logprobs)))
        margins.append(gold - max(logprobs))
    items = items_of(found, tasks, "invented")
    assert all(isinstance(item, Item) and item.group == "" for item in items)
    assert [item.value for item in items] == right and len({item.id for item in items}) == 3
    more = answer_items(found, tasks, "invented")
    assert [one.value for one in more if one.metric == "margin"] == pytest.approx(margins, abs=1e-3)
    assert found["results"]["invented"]["acc,none"] == pytest.approx(sum(right) / 3)

    from datetime import datetime

    write_lm_eval_files(tmp_path / "out", [found], {"engram": {"step": 1}}, datetime(2026, 1, 2, 3, 4, 5))
    results = json.loads((tmp_path / "out" / "results_2026-01-02T03-04-05.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "engram"} <= results.keys()
    lines = (tmp_path / "out" / "samples_invented_2026-01-02T03-04-05.jsonl").read_text().splitlines()
    assert {"doc_id", "doc", "target", "arguments", "resps", "filter", "doc_hash", "acc"} <= json.loads(lines[0]).keys()


def test_shots_come_before_the_question(loaded: Loaded, local: Callable[[int], list[LocalTask]]) -> None:
    tasks = local(2)
    found = run_tasks(adapter(loaded, max_length=256), tasks, 1)
    ((context, _), *_) = found["samples"]["invented"][0]["arguments"]
    assert context.count("Q: ") == 3 and len(found["samples"]["invented"]) == 1


def test_no_question_is_among_its_own_examples(
    loaded: Loaded, local: Callable[[int], list[LocalTask]], tmp_path: Path
) -> None:
    """Where a task names no split for examples, they come from the questions that are asked."""
    task = tmp_path / "invented.yaml"
    task.write_text(TASK.replace("fewshot_split: dev\n", ""))
    local(0)
    task.write_text(TASK.replace("fewshot_split: dev\n", ""))
    data = tmp_path / "data" / "invented"
    tasks = write_tasks(tmp_path / "tasks", "invented", [task], data, read_manifest(data), 2)
    found = run_tasks(adapter(loaded, max_length=256), tasks, None)
    for sample in found["samples"]["invented"]:
        (prompt, _), *_ = sample["arguments"]
        assert prompt.count("Q: ") == 3 and prompt.count(f"Q: {sample['doc']['question']}\n") == 1


def test_a_fault_of_the_model_is_not_one_of_the_data(
    loaded: Loaded, local: Callable[[int], list[LocalTask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness, "score", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_tasks(adapter(loaded), local(0), None)


def test_losses_of_texts_become_numbers(loaded: Loaded, tmp_path: Path) -> None:
    from eval.benchmarks.add import add_files

    texts = ["the people of the states", "shall have power to lay and collect taxes"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    add_files(tmp_path / "data", "texts", [("test", tmp_path / "rows.jsonl")], "none", "made up")
    task = tmp_path / "texts.yaml"
    kinds = "".join(
        f"  - {{metric: {name}, aggregation: {how}, higher_is_better: false}}\n"
        for name, how in (
            ("byte_perplexity", "weighted_perplexity"),
            ("word_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    )
    task.write_text(
        "task: texts\ndataset_path: x\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list:\n" + kinds
    )
    data = tmp_path / "data" / "texts"
    tasks = write_tasks(tmp_path / "tasks", "texts", [task], data, read_manifest(data), 0)
    lm = adapter(loaded, max_length=64)
    found = run_tasks(lm, tasks, None)
    items = items_of(found, tasks, "texts")
    assert [item.metric for item in items] == 2 * ["bits_per_byte"]
    assert [item.weight for item in items] == [len(text.encode()) for text in texts]
    # Weighted by bytes, their mean is lm-eval's own number.
    (metric,) = summarise(items)
    assert metric.value == pytest.approx(found["results"]["texts"]["bits_per_byte,none"])
    assert [one.metric for one in corpus_metrics(found, tasks, "texts")] == ["word_perplexity", "byte_perplexity"]
    assert lm.counts.after_end.total() == 2


def test_rows_of_another_form(loaded: Loaded, local: Callable[[int], list[LocalTask]], tmp_path: Path) -> None:
    tasks = local(0)
    (tmp_path / "data" / "invented" / "test.jsonl").write_text('{"text": "no question here"}\n')
    with pytest.raises(UserError, match="lm-eval cannot run invented on this data"):
        run_tasks(adapter(loaded), tasks, None)


def test_a_split_that_is_missing(local: Callable[[int], list[LocalTask]], tmp_path: Path) -> None:
    data, task = tmp_path / "data" / "invented", tmp_path / "invented.yaml"
    local(0)
    manifest = read_manifest(data)
    alone = manifest.replace(files={"test.jsonl": manifest.files["test.jsonl"]})
    (only,) = write_tasks(tmp_path / "tasks", "invented", [task], data, alone, 0)
    assert "fewshot_split: null" in only.path.read_text()
    with pytest.raises(UserError, match="takes its 5 few-shot examples from the split 'dev'.*or set shots: 0"):
        write_tasks(tmp_path / "tasks", "invented", [task], data, alone, 5)
    dev = manifest.replace(files={"dev.jsonl": manifest.files["dev.jsonl"]})
    with pytest.raises(UserError, match="is scored on the split 'test', but there are only dev"):
        write_tasks(tmp_path / "tasks", "invented", [task], data, dev, 0)


def test_every_benchmark_s_task_file_exists() -> None:
    from eval.benchmarks.catalogue import benchmarks
    from eval.suites.lm_tasks import OWN_TASKS

    for one in benchmarks().values():
        if one.run in ("harness", "own"):
            files = task_files(str(one.tasks), lm_eval_tasks() if one.run == "harness" else OWN_TASKS)
            assert len(files) >= {"mmlu": 57, "cmmlu": 67, "ceval": 52, "bbh": 27, "agieval": 20}.get(one.name, 1), one
    with pytest.raises(UserError, match="no task file of this name"):
        task_files("nothing/*.yaml", lm_eval_tasks())
