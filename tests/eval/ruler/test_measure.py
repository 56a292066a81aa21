"""RULER from samples to scores: planted readers, a tiny model against plain loops, and the whole command."""

import csv
import json
import warnings
from pathlib import Path

import pytest
import torch

from engram.config import UserError
from eval.__main__ import main
from eval.loading import Loaded, load
from eval.ruler import measure as measuring
from eval.ruler.measure import EXACT, LOGPROB, STRING_MATCH, measure, request
from eval.ruler.sample import Sample, sample
from eval.ruler.summary import ALL, by_depth, collect, difference, effective_length, score_of
from eval.ruler.tasks import Sources, all_tasks, choose
from eval.scoring import Request, Score
from tests.eval.long_runs import CONTEXT, train
from tests.eval.pieces import solve


@pytest.fixture(scope="module")
def long_run(workplace: Path, prepared_folder: Path) -> Path:
    return train(workplace, "long")


@pytest.fixture(scope="module")
def long_baseline(workplace: Path, prepared_folder: Path) -> Path:
    return train(workplace, "long_moe", **{"model.memory": "null"})


@pytest.fixture(scope="module")
def loaded(long_run: Path) -> Loaded:
    return load(long_run, "cpu")


@pytest.fixture(scope="module")
def samples(loaded: Loaded) -> list[Sample]:
    tasks = choose(all_tasks("tiny", Sources()), ("S", "VT", "QA"))
    return [
        sample(task, loaded.tokenizer, length, 0, index)
        for task in tasks.values()
        for length in (384, 512)
        for index in range(4)
    ]


def test_a_reader_scores_100_and_one_who_forgets_the_far_part_does_not(
    loaded: Loaded, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_prompt = {tuple(loaded.encode(one.prompt)): one for one in samples}

    def forced(model: object, requests: list[Request], **_: object) -> list[Score]:
        return [Score((-0.5,) * len(asked.continuation), True) for asked in requests]

    def read(_: Loaded, questions: list, advance: object = None) -> list[str]:
        found = []
        for question in questions:
            one = by_prompt[question.prompt]
            assert question.max_new_tokens == one.new_tokens
            # What stands in the first half of the longer samples is lost.
            lost = one.max_length == 512 and min(one.needle_depths) < 0.5
            found.append("" if lost else " and ".join(solve(one)).upper())
        return found

    monkeypatch.setattr(measuring, "score", forced)
    monkeypatch.setattr(measuring, "answer_together", read)
    items = measure(loaded, samples, generate=True)
    scores = collect(items, samples, STRING_MATCH)
    assert list(scores.groups) == ["S", "VT", "QA", ALL] and scores.lengths == [384, 512]
    assert all(scores.units(group, 384).tolist() == [1] * 4 for group in scores.groups)
    kept = [one for one in samples if one.max_length == 512 and min(one.needle_depths) >= 0.5]
    long = [one for one in samples if one.max_length == 512]
    assert scores.units(ALL, 512).mean() == pytest.approx(len(kept) / len(long))
    assert effective_length(scores) == 384 and effective_length(scores, 1.0) is None
    assert effective_length(scores, 0.0) == 512
    # Every task of a group weighs the same.
    single = [scores.values[task, 512].mean() for task in ("niah_single_1", "niah_single_2", "niah_single_3")]
    assert score_of(scores, "S", 512, 0.9, 0).mean == pytest.approx(sum(single) / 3)

    lengths, means_DL, counts_DL = by_depth(items, samples, STRING_MATCH)
    one_needle = [one for one in long if len(one.needle_depths) == 1]
    assert lengths == [384, 512] and counts_DL[:, 1].sum() == len(one_needle)
    assert all(means_DL[depth, 1] == 0 for depth in (0, 1) if counts_DL[depth, 1])
    assert all(means_DL[depth, 1] == 1 for depth in (3, 4) if counts_DL[depth, 1])

    # Against itself, nothing differs; teacher-forced numbers come from the scores.
    assert difference(scores, scores, ALL, 512, 0.9, 0).mean == 0
    assert collect(items, samples, LOGPROB).units(ALL, 384).tolist() == [-0.5] * 4
    assert collect(items, samples, EXACT).units(ALL, 384).tolist() == [1] * 4


def test_forced_scores_are_those_of_a_plain_loop(loaded: Loaded, samples: list[Sample]) -> None:
    chosen = samples[::9]
    items = {(item.id, item.metric): item.value for item in measure(loaded, chosen, generate=False)}
    for one in chosen:
        asked = request(loaded, one)
        whole = [*asked.context, *asked.continuation]
        logprobs = torch.log_softmax(loaded.model(torch.tensor([whole]))[0].detach().double(), dim=-1)
        total, exact = 0.0, True
        for place in range(len(asked.context), len(whole)):
            total += float(logprobs[place - 1, whole[place]])
            exact &= int(logprobs[place - 1].argmax()) == whole[place]
        assert items[one.id, LOGPROB] == pytest.approx(total / len(asked.continuation), abs=1e-4)
        assert items[one.id, EXACT] == exact


def test_a_request_is_the_prompt_and_the_answer_after_one_space(loaded: Loaded, samples: list[Sample]) -> None:
    for one in samples:
        asked = request(loaded, one)
        text = f"{one.prompt.rstrip()} {one.answer}"
        assert loaded.tokenizer.decode([*asked.context, *asked.continuation]) == text
        assert list(asked.context) == loaded.encode(one.prompt.rstrip())[: len(asked.context)]
        assert one.answer in loaded.tokenizer.decode([*asked.context, *asked.continuation])[-len(one.answer) - 3 :]
        assert len(asked.context) + len(asked.continuation) <= one.max_length


def test_a_sample_beyond_the_context_is_refused(loaded: Loaded) -> None:
    task = all_tasks("tiny", Sources())["niah_single_1"]
    too_long = sample(task, loaded.tokenizer, CONTEXT + 1, 0, 0)
    with pytest.raises(UserError, match=r"--lengths has 513, but .*long.* was trained with 512 tokens"):
        measure(loaded, [too_long], generate=False)


def test_the_command(long_run: Path, long_baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ruler", "--checkpoint", str(long_run), "--baseline", str(long_baseline), "--device", "cpu"]
    arguments += ["--tasks", "niah_single_1,fwe", "--lengths", "384", "--samples", "2", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--match", "flops", "--name", "memory", "--baseline-name", "MoE"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"matched by flops: {long_run}/step_000002 (step 2, 1,024 tokens, ")
    assert "memory, 384 tokens, string_match: S " in printed and "MoE: longest length above 85.6%: none" in printed
    out = tmp_path / "out"
    for name in ("groups", "lengths", "depth"):
        assert {(out / f"{name}.{kind}").exists() for kind in ("png", "pdf", "svg", "csv")} == {True}
    page = (out / "ruler.html").read_text()
    assert "memory - MoE" in page and "not resolved" in page and "http" not in page
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert {row["group"] for row in rows} == {"memory; 384", "MoE; 384"} and {row["n"] for row in rows} == {"2"}
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["models"]["memory"]["checkpoint"] == str(long_run / "step_000002")
    assert facts["settings"]["tasks"] == {"niah_single_1": "noise", "fwe": "words"}
    assert len((out / "samples" / "fwe_384.jsonl").read_text().splitlines()) == 2


def test_answers_that_stand_in_several_places_have_no_map_of_depths(long_run: Path, tmp_path: Path) -> None:
    arguments = ["ruler", "--checkpoint", str(long_run), "--tasks", "VT", "--samples", "2", "--lengths", "256"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([*arguments, "--forced-only", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "lengths.csv").exists() and not (tmp_path / "depth.csv").exists()


def test_what_cannot_be_asked(long_run: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = ["ruler", "--checkpoint", str(long_run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    cases = {
        ("--lengths", "1024"): "--lengths has 1,024, but",
        ("--tasks", "vtt"): "no task 'vtt': did you mean 'vt'",
        ("--lengths", "40"): "its smallest sample 0 takes",
        ("--match", "loss"): "--match loss needs another run to match with",
        ("--baseline", str(long_run), "--name", "baseline"): "both models are called 'baseline'",
        ("--squad", str(tmp_path / "none.json")): "cannot be read as JSON",
        ("--baseline", str(run_folder)): "the context holds 32 tokens, but RULER needs 256",
    }
    for arguments, message in cases.items():
        assert main([*start, *arguments]) == 2, arguments
        found = capsys.readouterr()
        assert message in found.err, arguments
        assert not found.out and not (tmp_path / "out").exists()
