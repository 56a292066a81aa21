"""Scores of answers, crowding and tables against loops; `python -m eval facts` end to end on runs of a small world."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engram.config import Config, UserError, load_config
from engram.data.prepare import prepare
from engram.data.world import build_world, documents
from eval.bootstrap import Interval
from eval.commands import facts as command
from eval.facts.crowding import crowded_items, crowding
from eval.facts.questions import SETS, ask
from eval.facts.score import facts_items, facts_suite, world_of
from eval.facts.study import _labels
from eval.facts.tables import Row, Run, collision_rows, columns_of, difference_rows, exposure_rows, score_rows
from eval.loading import Loaded, load
from eval.results import Item
from eval.sensitivity.interventions import intervened
from tests.eval.conftest import _train, tiny_config

WORLD = {"levels": 3, "entities_per_level": 3, "statements_per_level": 16, "reading_documents": 24}


def config_of(folder: Path, name: str, **changes: object) -> Config:
    """The tiny model of the other tests, on a world of nine entities."""
    tree = yaml.safe_load((folder / "base.yaml").read_text())
    tree["run_dir"] = str(folder / "runs" / name)
    for key, value in changes.items():
        tree[key] = value if not isinstance(value, dict) else tree.get(key, {}) | value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


@pytest.fixture(scope="module", autouse=True)
def _few_questions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.facts.questions.PER_SET", 8)
        patch.setattr("eval.facts.questions.PER_LEVEL", 12)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tree = tiny_config(folder, "base").model_dump(mode="json")
    tree["model"]["vocab_size"] = 600
    tree["data"] |= {"sources": [{"world": WORLD}], "sequence_length": 512}
    tree["train"] |= {"steps": 2, "batch_size": 2, "eval_every": 2, "checkpoint_every": 2, "statistics_every": None}
    tree["eval"] |= {"tokens": 512, "batch_size": 1}
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    prepare(config_of(folder, "prepare"))
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    model = yaml.safe_load((place / "base.yaml").read_text())["model"]
    return {
        "engram": _train(config_of(place, "engram")),
        "again": _train(config_of(place, "again", seed=1, data={"shuffle_seed": 1})),
        "moe": _train(config_of(place, "moe", model=model | {"memory": None})),
    }


@pytest.fixture(scope="module")
def loaded(runs: dict[str, Path]) -> Loaded:
    return load(runs["engram"], "cpu", threads=1)


@pytest.fixture(scope="module")
def items(loaded: Loaded) -> list[Item]:
    return facts_items(loaded)


# -------------------------------------------------------------------------------------------------------------- scores


def test_metrics_against_a_loop_over_towns(loaded: Loaded, items: list[Item]) -> None:
    world = world_of(loaded.config)
    found = {(item.task, item.id, item.metric): item.value for item in items}
    asked, sets = ask(world), ("local_fact", "conflict", "copy")
    assert len({(item.task, item.id) for item in items}) == len(asked)
    for question in {question.task: question for question in asked if question.task in sets}.values():
        prompt = loaded.tokenizer.encode(question.prompt)
        logprobs, greedy = [], []
        for town in world.towns:
            answer = loaded.tokenizer.encode(f" {town}")
            # What is scored are the tokens of the whole text.
            assert loaded.tokenizer.encode(f"{question.prompt} {town}") == prompt + answer
            with torch.no_grad():
                logits = loaded.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].double()
            chosen = torch.log_softmax(logits, -1)[range(len(answer)), answer]
            logprobs.append(float(chosen.sum()))
            greedy.append(logits.argmax(-1).tolist() == answer)
        gold, best = logprobs[question.gold], int(np.argmax(logprobs))
        expected = {
            "accuracy": float(best == question.gold),
            "margin": gold - max(value for place, value in enumerate(logprobs) if place != question.gold),
            "bits_per_byte": -gold / math.log(2) / (len(world.towns[question.gold]) + 1),
            "cloze": float(greedy[question.gold]),
        }
        if question.task == "conflict":
            expected["memorised"] = float(best == question.memorised)
        mine = {
            metric: value
            for (task, name, metric), value in found.items()
            if (task, name) == (question.task, question.id)
        }
        assert mine == pytest.approx(expected, abs=1e-4)


def test_a_model_without_its_memory_answers_the_same_questions(loaded: Loaded, items: list[Item]) -> None:
    suite = facts_suite(loaded)
    assert suite.chance == dict.fromkeys(SETS, 1 / 32) | {"context_fact": 1 / 2, "niah": 1 / 3, "variables": 1 / 3}
    assert suite.kinds["local_fact"] == "knowledge"
    with intervened(loaded.model, "zero_embedding"):
        off = suite.items(loaded)
    assert [(item.task, item.id, item.metric) for item in off] == [(item.task, item.id, item.metric) for item in items]
    changed = [a.value != b.value for a, b in zip(items, off, strict=True) if a.metric == "margin"]
    assert np.mean(changed) > 0.9


def test_models_of_other_texts_are_refused(loaded: Loaded, place: Path) -> None:
    other = config_of(place, "other", data={"sources": [{"name": "sotu"}]})
    with pytest.raises(UserError, match=r"was trained on sotu: facts are asked of models .* one world"):
        world_of(other)
    two = config_of(place, "two", data={"sources": [{"world": {}}, {"world": {"seed": 1}}]})
    with pytest.raises(UserError, match="was trained on a world, a world"):
        world_of(two)


# ------------------------------------------------------------------------------------------------------------ crowding


def test_crowding_against_a_loop(loaded: Loaded) -> None:
    """Rows and n-grams counted position by position, each text alone."""
    world = world_of(loaded.config)
    texts = list(documents(world))[:40]
    prompts = [text[: text.index(".", 60)] for text in texts[:9]]
    heads, reads = loaded.config.model.memory.num_heads, Counter()
    grams: Counter[tuple[int, ...]] = Counter()
    keys = loaded.model.vocabulary.table

    def visit(text: str) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
        ids = loaded.tokenizer.encode(text)
        hashed = loaded.model.hash_ids(torch.tensor([ids]))
        found = []
        for position in range(len(ids)):
            gram = tuple(int(keys[token]) for token in ids[max(0, position - 2) : position + 1])
            rows = [(layer, int(row)) for layer in hashed for row in hashed[layer][0, position, -heads:]]
            found.append((gram, rows))
        return found

    for text in texts:
        for gram, rows in visit(text):
            grams[gram] += 1
            reads.update(rows)
    expected = []
    for prompt in prompts:
        gram, rows = visit(prompt)[-1]
        expected.append(1 - np.mean([grams[gram] / reads[row] for row in rows]))
    assert len(set(expected)) > 3
    np.testing.assert_allclose(crowding(loaded, texts, prompts), expected, rtol=1e-12)


def test_crowded_and_lonely_facts_are_matched_by_level(loaded: Loaded, items: list[Item]) -> None:
    world = world_of(loaded.config)
    found = crowded_items(loaded, world, items)
    asked = ask(world, ("local_fact",))
    level = {question.id: question.group for question in asked}
    groups = {group: [item.id for item in found if item.group == group] for group in ("crowded", "alone")}
    # Three entities with four facts each: a third of twelve.
    for group in groups.values():
        assert Counter(level[name] for name in group) == {"1": 4, "2": 4, "4": 4}
    assert not set(groups["crowded"]) & set(groups["alone"])
    shares = crowding(loaded, list(documents(world)), [question.prompt for question in asked])
    by_id = {question.id: share for question, share in zip(asked, shares, strict=True)}
    for name in ("1", "2", "4"):
        low = max(by_id[one] for one in groups["alone"] if level[one] == name)
        assert all(by_id[one] >= low for one in groups["crowded"] if level[one] == name)
    right = {item.id: item.value for item in items if (item.task, item.metric) == ("local_fact", "accuracy")}
    assert all(item.value == right[item.id] for item in found)


# -------------------------------------------------------------------------------------------------------------- tables


def run_of(recipe: str, seed: int, values: list[float]) -> Run:
    """Answers to local facts of two levels, and the same as crowded (first half) and alone."""
    facts = [Item("local_fact", f"{n}", "accuracy", value, "1" if n % 2 else "2") for n, value in enumerate(values)]
    half = len(values) // 2
    groups = ["crowded" if n < half else "alone" for n in range(len(values))]
    lonely = [Item("collision", f"{n}", "accuracy", value, groups[n]) for n, value in enumerate(values)]
    return Run(recipe, f"/{recipe}/{seed}", seed, 5, [*facts, *lonely])


def test_rows_of_scores_levels_and_collisions() -> None:
    values = [1.0] * 6 + [0.0, 1.0] * 3
    (row,) = score_rows([run_of("a", 0, values)], 0.9, 0)
    assert (row.recipe, row.task, row.questions, row.runs) == ("a", "local_fact", 12, 1)
    assert float(row.interval.mean) == 0.75 and row.interval.low < 0.75 < row.interval.high
    levels = {row.group: float(row.interval.mean) for row in exposure_rows([run_of("a", 0, values)], 0.9, 0)}
    assert levels == {"1": 1.0, "2": 0.5}
    found = {row.group: row for row in collision_rows([run_of("a", 0, values)], 0.9, 0)}
    assert {group: float(row.interval.mean) for group, row in found.items()} == {
        "crowded": 1.0,
        "alone": 0.5,
        "crowded - alone": 0.5,
    }
    table = columns_of(list(found.values()), 1 / 32)
    assert table["chance"] == [1 / 32, 1 / 32, None]


def test_differences_are_paired_and_know_their_seeds() -> None:
    """Every question of the baseline but one in four is also answered by the model: no spread of questions is left."""
    base = [run_of("no memory", seed, [0.0, 1.0] * 8) for seed in range(3)]
    same = [run_of("a", seed, [0.0, 1.0] * 8) for seed in range(3)]
    (row,) = difference_rows(same, base, 0.95, 0)
    assert (
        float(row.interval.mean) == 0.0 and row.interval.low == row.interval.high == 0 and row.verdict == "not resolved"
    )
    better = [run_of("a", seed, [1.0] * 16) for seed in range(3)]
    (row,) = difference_rows(better, base, 0.95, 0)
    assert float(row.interval.mean) == 0.5 and row.verdict == "higher" and row.baseline == "no memory"
    (row,) = difference_rows(base[:1], better[:1], 0.95, 0)
    assert row.verdict == "lower in these runs (fewer than 3 seeds)"
    # Seeds that disagree leave it open, however many questions say the same of each.
    mixed = [run_of("a", seed, [float(seed)] * 100) for seed in (0, 1, 1)]
    (row,) = difference_rows(mixed, [run_of("b", seed, [0.5] * 100) for seed in range(3)], 0.95, 0)
    assert row.verdict == "not resolved"


def test_recipes_are_told_apart_by_all_but_seeds(place: Path) -> None:
    engram = config_of(place, "one")
    seeds = config_of(place, "two_seeds", seed=7, data={"shuffle_seed": 7})
    steps = config_of(place, "steps", train={"steps": 5})
    labels = _labels([engram, steps, seeds])
    assert labels[0] == labels[2] and labels[0].startswith("rho 0.") and labels[1] == f"{labels[0]} (2)"


def test_verdict_words() -> None:
    def verdict(low: float, high: float, runs: int) -> str:
        interval = Interval(np.array((low + high) / 2), np.array(low), np.array(high))
        return Row("a", "copy", "accuracy", "all", interval, 9, runs, "b", 3).verdict

    assert [verdict(0.1, 0.2, 3), verdict(-0.2, -0.1, 5), verdict(-0.1, 0.2, 3)] == ["higher", "lower", "not resolved"]
    assert verdict(0.1, 0.2, 2) == "higher in these runs (fewer than 3 seeds)"


# ------------------------------------------------------------------------------------------------------------- command


Facts = Callable[..., str]


@pytest.fixture
def facts(capsys: pytest.CaptureFixture) -> Facts:
    import argparse

    def call(*arguments: object) -> str:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.run(parser.parse_args([str(argument) for argument in arguments]))
        return capsys.readouterr().out

    return call


def test_the_command_writes_tables_figures_and_page(runs: dict[str, Path], tmp_path: Path, facts: Facts) -> None:
    out = tmp_path / "facts"
    sets = ("--sets", "local_fact,copy,conflict")
    sides = ("--checkpoint", runs["engram"], runs["again"], "--baseline", runs["moe"])
    printed = facts(*sides, *sets, "--out", out, "--threads", 1)
    names = {path.name for path in out.iterdir()}
    figures = {f"{name}.{kind}" for name in ("sets", "recall") for kind in ("png", "pdf", "svg", "csv")}
    assert names == figures | {"facts.html", "scores.csv", "items.csv", "metrics.csv", "provenance.json"}
    rows = list(csv.DictReader((out / "scores.csv").open()))
    recipes = {row["recipe"]: row for row in rows if row["task"] == "copy" and not row["baseline"]}
    # The two seeds are one recipe.
    (label,) = (name for name in recipes if name != "no memory")
    assert label.startswith("rho ") and recipes[label]["runs"] == "2" and recipes["no memory"]["runs"] == "1"
    assert {row["metric"] for row in rows if row["task"] == "conflict" and row["baseline"]} == {"accuracy", "margin"}
    assert f"{label} - no memory: local_fact" in printed and printed.rstrip().endswith("facts.html")
    assert {row["recipe"] for row in rows if row["task"] == "collision"} == {label}
    recall = list(csv.DictReader((out / "recall.csv").open()))
    assert [row["group"] for row in recall if row["recipe"] == label] == ["1", "2", "4"]
    # The mean of a row is that of its items over both runs.
    kept = [row for row in csv.DictReader((out / "items.csv").open()) if row["group"].startswith(f"{label}, seed ")]
    values = [float(row["value"]) for row in kept if (row["task"], row["metric"]) == ("local_fact", "margin")]
    (row,) = (
        one
        for one in rows
        if (one["recipe"], one["baseline"], one["task"], one["metric"], one["group"])
        == (label, "", "local_fact", "margin", "all")
    )
    assert float(row["mean"]) == pytest.approx(np.mean(values))
    metrics = list(csv.DictReader((out / "metrics.csv").open()))
    better = {row["metric"]: row["higher_is_better"] for row in metrics}
    assert better["accuracy"] == "True" and better["bits_per_byte"] == "False"
    told = json.loads((out / "provenance.json").read_text())
    assert told["world"]["levels"] == 3 and [run["seed"] for run in told["runs"]] == [0, 0, 1]
    page = (out / "facts.html").read_text()
    assert "0.031" in page and "Collisions" in page and "Against no memory" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "engram", "--out", "o", "--sets", "locl"), "there is no set 'locl'"),
        (("--checkpoint", "engram"), "give --checkpoint and --out, or --certify"),
        (("--checkpoint", "engram", "--baseline", "moe", "again", "--out", "o"), "give one recipe"),
    ],
)
def test_wrong_calls(
    runs: dict[str, Path],
    tmp_path: Path,
    facts: Facts,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("--sets", "copy") if "--sets" not in arguments else ()
    with pytest.raises(UserError, match=message):
        facts(*(runs.get(name, name) for name in arguments), *quick, "--threads", 1)
    assert not (tmp_path / "o").exists()


def test_different_worlds_are_refused(place: Path, runs: dict[str, Path], tmp_path: Path, facts: Facts) -> None:
    other = WORLD | {"seed": 9}
    changed = config_of(place, "elsewhere", data={"sources": [{"world": other}], "path": str(tmp_path / "data")})
    prepare(changed)
    with pytest.raises(UserError, match="was trained on another world than"):
        facts("--checkpoint", runs["moe"], _train(changed), "--sets", "copy", "--out", tmp_path / "o", "--threads", 1)


def test_certify_prints_and_fails_where_a_set_leaks(
    place: Path, tmp_path: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = place / "base.yaml"
    printed = facts("--certify", "--config", base, "--sets", "local_fact,copy")
    assert "words in a row with the training text: 0" in printed and "FAILS" not in printed
    assert len([line for line in printed.splitlines() if "expected: solves it" in line]) == 2
    world = build_world(load_config(base).data.sources[0].world)
    (question, *_) = ask(world, ("copy",))
    leaked = [*documents(world), question.prompt]
    monkeypatch.setattr("engram.data.world.documents", lambda world: leaked)
    with pytest.raises(UserError, match="leak or are broken"):
        facts("--certify", "--config", base, "--sets", "local_fact,copy")
