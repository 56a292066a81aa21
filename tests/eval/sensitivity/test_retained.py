"""Arithmetic of retained scores, conditions and frequency bins against loops; the command end to end."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.config import UserError
from engram.data.loader import Loader
from engram.data.shards import Dataset
from eval.__main__ import main
from eval.bootstrap import interval
from eval.capture import Capture
from eval.loading import Loaded, load
from eval.results import Item
from eval.sensitivity.interventions import intervened
from eval.sensitivity.memory_loss import BINS, frequency_bins, loss_changes, token_losses
from eval.sensitivity.page import build_page
from eval.sensitivity.retained import Condition, Suite, compare, conditions, retained
from tests.eval.models import MEMORY, build


def items(values: dict[str, list[float]], metric: str = "accuracy") -> list[Item]:
    return [Item(task, f"{n}", metric, value) for task, scores in values.items() for n, value in enumerate(scores)]


def suite(**chance: float) -> Suite:
    return Suite("facts", lambda loaded: [], "accuracy", chance, {"local": "knowledge", "context": "reading"})


def test_retained_and_chance_adjusted_scores() -> None:
    """On 0.6 and off 0.3 with chance 0.25: half is kept, and (0.3 - 0.25) / (0.6 - 0.25) above chance."""
    on, off = [1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 70
    condition = Condition("zero_embedding")
    # Items come in any order, beside other metrics and tasks.
    mine = [*items({"local": on, "other": [1.0] * 9}), *items({"local": [7.0] * 100}, "margin")]
    (found,) = retained(condition, suite(local=0.25), [mine], [items({"local": off})[::-1]])
    assert found.ratio is not None and found.adjusted is not None
    assert (found.on, found.off, found.items, found.runs, found.kind) == (0.6, 0.3, 100, 1, "knowledge")
    assert float(found.ratio.mean) == pytest.approx(0.5) and float(found.adjusted.mean) == pytest.approx(0.05 / 0.35)
    assert found.ratio.low < 0.5 < found.ratio.high
    # The paper's C3: 63.6 on, 59.1 off, chance 25.
    plain, adjusted = compare(*(np.array([[1.0] * n + [0.0] * (1000 - n)]) for n in (636, 591)), 0.25)
    assert plain is not None and adjusted is not None
    assert (round(float(plain.mean), 2), round(float(adjusted.mean), 2)) == (0.93, 0.88)


def test_intervals_are_paired_over_items() -> None:
    """Every item keeps half: the ratio has no spread, though both scores have much."""
    on = np.random.default_rng(0).random((1, 50))
    plain, _ = compare(on, on / 2, 0.0)
    assert plain is not None and (float(plain.low), float(plain.high)) == (pytest.approx(0.5), pytest.approx(0.5))
    # Of independent items it has, and it is that of drawing items anew.
    off = np.random.default_rng(1).random((1, 50))
    plain, adjusted = compare(on, off, 0.1, level=0.8, seed=3)
    assert plain is not None and adjusted is not None
    drawn = np.random.default_rng(3).multinomial(50, np.full(50, 1 / 50), size=2000)
    for found, chance in ((plain, 0.0), (adjusted, 0.1)):
        ratios = [(n @ (off[0] - chance)) / (n @ (on[0] - chance)) for n in drawn]
        assert (float(found.low), float(found.high)) == pytest.approx(tuple(np.quantile(ratios, [0.1, 0.9])))


def test_several_runs_are_averaged_and_their_spread_widens_the_interval() -> None:
    on = np.array([[1.0] * 80 + [0.0] * 20] * 2)
    alike = np.array([[1.0] * 40 + [0.0] * 60] * 2)
    apart = np.array([[1.0] * 10 + [0.0] * 90, [1.0] * 70 + [0.0] * 30])
    near, far = compare(on, alike, 0.0)[0], compare(on, apart, 0.0)[0]
    assert near is not None and far is not None
    assert float(near.mean) == pytest.approx(0.5) and float(far.mean) == pytest.approx((10 / 80 + 70 / 80) / 2)
    assert far.high - far.low > 3 * (near.high - near.low)


@pytest.mark.parametrize(("right", "hidden"), [(25, True), (33, True), (35, False), (10, True), (0, True)])
def test_no_ratio_where_memory_on_is_at_chance(right: int, hidden: bool) -> None:
    """Chance 0.25 of 100 items; two standard errors are 0.09 there."""
    on = np.array([[1.0] * right + [0.0] * (100 - right)])
    assert (compare(on, on, 0.25) == (None, None)) == hidden
    assert compare(on[:, :1], on[:, :1], 0.0) == (None, None)


def test_runs_that_answer_other_items_are_refused() -> None:
    on = [items({"local": [1.0, 1.0]})]
    for other in (items({"local": [1.0]}), items({"context": [1.0, 1.0]}), []):
        with pytest.raises(UserError, match="did not answer the same items of local"):
            retained(Condition("mean"), suite(local=0.0), on, [other])


def test_conditions_part_by_part() -> None:
    config = build(memory=MEMORY | {"layer_ids": [0, 2]}).config.memory
    assert config is not None
    labels = {per: [one.label for one in conditions(config, ["mean"], per)] for per in (None, "layer", "order")}
    assert labels == {
        None: ["mean"],
        "layer": ["mean, layer 0", "mean, layer 2"],
        "order": ["mean, order 2", "mean, order 3"],
    }
    heads = [one.label for one in conditions(config, ["mean", "shuffled", "mean"], "head")]
    assert heads[:4] == [f"mean, order {order}, head {head}" for order in (2, 3) for head in (0, 1)]
    assert len(heads) == 8
    assert [one.label for one in conditions(config, ["zero_output"], "layer")] == [
        "zero_output, layer 0",
        "zero_output, layer 2",
    ]
    for mode, per, message in (
        ("gate_one", "head", "what all orders and heads"),
        ("zero_embed", None, "did you mean 'zero_embedding'"),
    ):
        with pytest.raises(UserError, match=message):
            conditions(config, [mode], per)


def test_the_page_ranks_tasks_and_hides_what_was_at_chance(tmp_path: Path) -> None:
    on = {"local": [1.0] * 80 + [0.0] * 20, "context": [1.0] * 60 + [0.0] * 40, "hop": [1.0] * 2 + [0.0] * 98}
    off = {"local": [1.0] * 20 + [0.0] * 80, "context": [1.0] * 54 + [0.0] * 46, "hop": [1.0] * 2 + [0.0] * 98}
    asked = suite(local=0.02, context=0.02, hop=0.02)
    found = retained(Condition("zero_embedding", layer=1), asked, [items(on)], [items(off)])
    page = build_page("a model", [found], [], tmp_path, 0.9).render()
    rows = list(csv.DictReader((tmp_path / "retained_zero_embedding_layer_1.csv").open()))
    # The paper's order: what keeps most stands first; what was at chance has no number.
    assert [(row["task"], row["kind"]) for row in rows] == [
        ("context", "reading"),
        ("local", "knowledge"),
        ("hop", "other"),
    ]
    assert [row["retained"] for row in rows[:2]] == ["0.9", "0.25"] and rows[2]["retained"] == rows[2][
        "adjusted_low"
    ] == ""
    assert float(rows[1]["adjusted"]) == pytest.approx(0.18 / 0.78)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf", ".svg", ".csv"}
    assert "not above chance with memory on" in page and "0.900 (" in page


@torch.no_grad()
def test_losses_of_tokens_are_those_of_each_document_alone() -> None:
    model = build()
    documents = [torch.randint(50, (length,)).tolist() for length in (7, 2, 19, 12)]
    expected = []
    for document in documents:
        logits = model(torch.tensor([document]))[0, :-1].double()
        expected += (-torch.log_softmax(logits, -1)[range(len(document) - 1), document[1:]]).tolist()
    np.testing.assert_allclose(token_losses(model, documents, max_tokens=25), expected, rtol=1e-4)


def test_changes_of_the_loss_in_nats_and_bits_by_bin() -> None:
    rng = np.random.default_rng(0)
    on, off = rng.random((2, 60)), 1 + rng.random((2, 60))
    document, num_bytes = np.repeat(np.arange(12), 5), rng.integers(1, 6, size=60)
    bins = np.array(list(BINS))[rng.integers(4, size=60)]
    found = {one.bin: one for one in loss_changes(on, off, document, num_bytes, bins)}
    assert list(found) == ["all", "never", "once", "2 to 9", "10 to 99"]
    for name, one in found.items():
        here = (bins == name) | (name == "all")
        rise = (off - on)[:, here]
        assert float(one.rise.mean) == pytest.approx(rise.mean())
        assert float(one.rise_bits.mean) == pytest.approx(rise.sum(1).mean() / np.log(2) / num_bytes[here].sum())
        assert (one.on, one.off) == pytest.approx((on[:, here].mean(), off[:, here].mean()))
        assert (one.targets, one.documents) == (here.sum(), len(set(document[here])))
    # Of one run, by drawing documents.
    (whole, *_) = loss_changes(on[:1], off[:1], document, num_bytes, bins, seed=4)
    by_document = np.array([(off - on)[0, document == d].sum() for d in range(12)])
    expected = interval(by_document, np.full(12, 5), seed=4)
    assert (float(whole.rise.low), float(whole.rise.high)) == (float(expected.low), float(expected.high))


def test_bins_count_the_n_grams_that_training_saw(run_folder: Path, prepared_folder: Path) -> None:
    loaded, training = load(run_folder, device="cpu"), Dataset(prepared_folder, "train")
    table = loaded.model.vocabulary.table
    seen: Counter[tuple[int, ...]] = Counter()
    loader = Loader(training, 32, 4, loaded.config.data.shuffle_seed, prefetch=0)
    for _ in range(12):
        batch = next(loader)
        for tokens, documents in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
            for t in range(32):
                first = max(0, t - 2)
                while documents[first] != documents[t]:
                    first += 1
                seen[tuple(table[token] for token in tokens[first : t + 1])] += 1
    documents = [training.window(start, length).tolist() for start, length in ((0, 40), (77, 2), (900, 33))]
    documents.append(np.random.default_rng(0).integers(3, 300, size=20).tolist())
    # Starts of documents, which training saw behind the end of others.
    documents += [training.window(start, 4).tolist() for start in training.documents[:40].tolist()]
    found = frequency_bins(loaded, training, documents).tolist()
    expected = []
    for document in documents:
        for t in range(len(document) - 1):
            count = seen[tuple(table[token] for token in document[max(0, t - 2) : t + 1])]
            expected.append(next(name for name, top in BINS.items() if count <= top))
    # A whole n-gram and the shorter ones of a document's start are told apart.
    assert found == expected and len(set(found)) >= 3


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main(["sensitivity", "--device", "cpu", "--threads", "1", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_command(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    options = ["--tokens", 300, "--reference-tokens", 300]
    status, printed, errors = run(
        capsys, "--checkpoint", run_folder, run_folder / "step_000006", "--out", out, *options
    )
    assert (status, errors) == (0, "")
    rows = list(csv.DictReader((out / "loss.csv").open()))
    assert {row["condition"] for row in rows} == {"zero_embedding", "mean", "shuffled"}
    assert {row["run"] for row in rows} == {"all", "step_000006", run_folder.name} and "never" in {
        row["bin"] for row in rows
    }
    assert {path.name for path in out.iterdir()} == {
        *(f"loss.{ending}" for ending in ("csv", "png", "pdf", "svg")),
        "items.csv",
        "metrics.csv",
        "provenance.json",
        "sensitivity.html",
    }
    metrics = list(csv.DictReader((out / "metrics.csv").open()))
    assert {row["task"] for row in metrics} == {"validation_loss"} and len(metrics) == 2 * (1 + 3)
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["settings"]["tokens"] == 300 and len(facts["checkpoints"]) == 2
    assert "sensitivity.html" in printed and "zero_embedding, all: loss" in printed
    page = (out / "sensitivity.html").read_text()
    assert "http" not in page and "depends on its memory, not that memory added this much" in page
    # The numbers are those of the interventions.
    loaded = load(run_folder, device="cpu")
    from eval.documents import read_documents

    documents = read_documents(Dataset(loaded.config.data.path, "validation"), 32, 300)
    on = token_losses(loaded.model, documents)
    with intervened(loaded.model, "zero_embedding"):
        off = token_losses(loaded.model, documents)
    row = next(r for r in rows if (r["condition"], r["run"], r["bin"]) == ("zero_embedding", run_folder.name, "all"))
    assert float(row["on"]) == pytest.approx(on.mean()) and float(row["rise"]) == pytest.approx((off - on).mean())


def test_command_asks_facts_with_memory_on_and_changed(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite whose answers are right as long as the memory adds something."""

    def planted(loaded: Loaded) -> list[Item]:
        with torch.no_grad(), Capture(loaded.model, ["memory_out"]) as seen:
            loaded.model.hidden(torch.tensor([[5, 6, 7, 8]]))
            right = seen["memory_out", 0].any() and seen["memory_out", 1].any()
        return items({"local": [float(right)] * 8 + [0.0] * 2, "context": [1.0] * 7 + [0.0] * 3})

    asked = Suite("facts", planted, "accuracy", {"local": 0.1, "context": 0.1}, {"local": "knowledge"})
    monkeypatch.setattr("eval.sensitivity.tasks.facts_suite", lambda loaded: asked)
    options = ["--tasks", "facts", "--modes", "zero_embedding,gate_one"]
    status, printed, _ = run(capsys, "--checkpoint", run_folder, "--out", tmp_path, *options)
    rows = list(csv.DictReader((tmp_path / "retained.csv").open()))
    kept = {(row["condition"], row["task"]): float(row["retained"]) for row in rows}
    assert status == 0 and kept == {
        ("zero_embedding", "local"): 0.0,
        ("gate_one", "local"): 1.0,
        ("zero_embedding", "context"): 1.0,
        ("gate_one", "context"): 1.0,
    }
    assert "zero_embedding: local 0.800 -> 0.000, 0.0% kept" in printed
    assert (tmp_path / "retained_gate_one.pdf").exists() and not (tmp_path / "loss.csv").exists()
    asked_again = list(csv.DictReader((tmp_path / "items.csv").open()))
    assert len(asked_again) == 20 * 3 and {row["group"] for row in asked_again} >= {f"{run_folder.name}; as it is"}


def test_command_part_by_part(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--checkpoint", run_folder, "--out", tmp_path, "--tokens", 100, "--modes", "zero_embedding"]
    assert run(capsys, *options, "--per", "head")[0] == 0
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert [row["condition"] for row in rows if row["bin"] == "all"] == [
        f"zero_embedding, order {order}, head {head}" for order in (2, 3) for head in (0, 1)
    ]


def test_command_refuses(
    run_folder: Path, baseline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("kept")
    cases: list[tuple[list[object], str]] = [
        (["--checkpoint", baseline_folder], "has no memory to switch off (model.memory is null)"),
        (["--checkpoint", run_folder, baseline_folder], "has no memory to switch off"),
        (["--checkpoint", run_folder, "--modes", "shuffle"], "did you mean 'shuffled'"),
        (["--checkpoint", run_folder, "--modes", "gate_one", "--per", "order"], "what all orders and heads"),
        (["--checkpoint", run_folder, "--tasks", "los"], "there is no task 'los': did you mean 'loss'?"),
        (["--checkpoint", run_folder, "--tasks", ""], "no task was named"),
        (["--checkpoint", run_folder, "--tasks", "facts"], "facts are asked of models that were trained on one world"),
        (["--checkpoint", run_folder, "--modes", ","], "no mode was named"),
        (["--checkpoint", run_folder, "--tokens", "1"], "has no document of at least 2 tokens within 1 tokens"),
        (["--checkpoint", run_folder, run_folder / "step_000012", "--tokens", "60"], "is given twice: give runs that"),
        (["--checkpoint", run_folder, "--out", tmp_path / "file"], "is a file: name a folder"),
    ]
    for arguments, message in cases:
        arguments = arguments if "--out" in arguments else [*arguments, "--out", tmp_path / "none"]
        status, printed, errors = run(capsys, *arguments)
        assert status == 2 and not printed and errors.startswith("error: ") and message in errors, (arguments, errors)
    assert not (tmp_path / "none").exists()


def test_another_model_beside_the_first_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load
    loads = iter([{}, {"num_heads": 1}])

    def other(*arguments: object) -> Loaded:
        loaded = real(run_folder, device="cpu")
        changes = next(loads)
        memory = loaded.model.config.memory
        assert memory is not None
        loaded.model.config = loaded.model.config.model_copy(update={"memory": memory.model_copy(update=changes)})
        return replace(loaded, folder=Path(str(len(changes))))

    monkeypatch.setattr("eval.sensitivity.study.load", other)
    status, _, errors = run(
        capsys, "--checkpoint", run_folder, run_folder / "step_000006", "--out", tmp_path / "o", "--tokens", 60
    )
    assert status == 2 and "step_000006 has another tokenizer or memory than" in errors


def test_one_run_at_chance_hides_the_ratio() -> None:
    """A mean of ratios would be that run's alone."""
    on = np.array([[1.0] * 80 + [0.0] * 20] * 2 + [[1.0] * 2 + [0.0] * 98])
    off = np.array([[1.0] * 20 + [0.0] * 80] * 2 + [[1.0] * 6 + [0.0] * 94])
    assert compare(on, off, 0.02) == (None, None)
    assert compare(on[:2], off[:2], 0.02)[0] is not None
