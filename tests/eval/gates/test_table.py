"""The reading of many documents and its long table against one document at a time; the page shows all of it."""

import csv
import io
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.__main__ import main
from eval.capture import Capture
from eval.gates.auc import octave
from eval.gates.reading import GateReading, read_gates
from eval.gates.table import Entities, collisions, long_table, summarise
from tests.eval.models import MEMORY, build

DOCUMENTS = [[5, 9, 5, 9, 3, 30, 31, 2, 8], [1], [5, 9, 40, 41, 42], [7] * 12]
TEXTS = [f" w{token}" for token in range(50)]


def lively(**changes: object) -> Transformer:
    model = build(memory=MEMORY | {"layer_ids": [0, 2], **changes})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".memory." in name:
                weight.copy_(torch.randn_like(weight) * 0.5)
    return model


def marks(reading: GateReading) -> Entities:
    inside = reading.token_N % 4 == 1
    return Entities(inside, inside & (reading.token_N > 4))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_every_position_as_if_its_document_ran_alone(bias: bool) -> None:
    model = lively(projection_bias=bias)
    found = read_gates(model, DOCUMENTS, max_tokens=24)
    assert found.layers == [0, 2] and found.series == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert found.token_N.tolist() == sum(DOCUMENTS, [])
    n = 0
    for index, document in enumerate(DOCUMENTS):
        ids = torch.tensor([document])
        with Capture(model, ["gates", "memory_out", "resid_pre"]) as seen:
            model.hidden(ids)
        hash_ids = model.hash_ids(ids)
        for t in range(len(document)):
            assert (found.document_N[n], found.position_N[n]) == (index, t)
            for place, layer in enumerate((0, 2)):
                memory = cast(Any, model.blocks[layer]).memory
                rows = memory.embed.weight[hash_ids[layer][0, t]].flatten()
                value = memory.wkv.weight[-16:] @ rows + (memory.wkv.bias[-16:] if bias else 0)
                assert found.addresses_LNH[place, n].tolist() == hash_ids[layer][0, t].tolist()
                assert found.rows_LN[place, n] == pytest.approx(rows.norm().item(), rel=1e-5)
                for g in range(2):
                    gate = seen["gates", layer][0, t, g].item()
                    added, stream = seen["memory_out", layer][0, t, g], seen["resid_pre", layer][0, t, g]
                    assert found.gate_LNG[place, n, g] == pytest.approx(gate, rel=1e-4)
                    assert found.value_LNG[place, n, g] == pytest.approx(gate * value.norm().item(), rel=1e-4)
                    assert found.relative_LNG[place, n, g] == pytest.approx(
                        (added.norm() / stream.norm()).item(), rel=1e-3
                    )
            n += 1
    assert not any(module._forward_hooks for module in model.modules())


def test_the_long_table_has_every_position_layer_and_stream() -> None:
    model = lively()
    found, config = read_gates(model, DOCUMENTS), model.config.memory
    assert config is not None
    shared = collisions(found, config, model.vocabulary.table)
    entities = marks(found)
    rows = long_table(found, entities, shared, TEXTS, config.orders).to_pylist()
    places = [(n, place, g) for n in range(27) for place in range(2) for g in range(2)]
    assert len(rows) == len(places)
    for row, (n, place, g) in zip(rows, places, strict=True):
        document, t = DOCUMENTS[found.document_N[n]], int(found.position_N[n])
        assert (row["document"], row["position"]) == (found.document_N[n], t)
        assert (row["layer"], row["stream"]) == ((0, 2)[place], g)
        assert row["token"] == TEXTS[document[t]]
        name = "final" if entities.final_N[n] else "inside" if entities.inside_N[n] else "outside"
        assert row["entity"] == name
        for order in (2, 3):
            assert row[f"ngram_{order}"] == "".join(TEXTS[token] for token in document[max(0, t - order + 1) : t + 1])
            heads = shared[place, n, 2 * order - 4 : 2 * order - 2]
            assert row[f"ngrams_on_row_{order}"] == heads.mean()
            assert row[f"colliding_heads_{order}"] == (heads > 1).sum()
        assert row["gate"] == found.gate_LNG[place, n, g] and row["rows_norm"] == found.rows_LN[place, n]
        assert row["gated_value"] == found.value_LNG[place, n, g]
        assert row["relative_output"] == found.relative_LNG[place, n, g]


def test_streams_are_ranked_by_the_score_declared_beforehand() -> None:
    """Planted gates: stream 1 of the first layer opens at names' ends, stream 0 of the second closes there."""
    model = lively()
    found = read_gates(model, [list(np.random.default_rng(i).integers(50, size=30)) for i in range(20)])
    entities = marks(found)
    gates = np.random.default_rng(0).random(found.gate_LNG.shape).astype(np.float32)
    gates[0, :, 1] += entities.final_N
    gates[1, :, 0] -= entities.final_N
    # Inner tokens of names are no controls: what the gate does there must not matter.
    gates[:, entities.inside_N & ~entities.final_N] = 5
    planted = GateReading(**{**vars(found), "gate_LNG": gates})
    ranked = summarise(planted, entities)
    assert (ranked[0].layer, ranked[0].stream, ranked[0].auc.verdict) == (0, 1, "higher")
    assert (ranked[-1].layer, ranked[-1].stream, ranked[-1].auc.verdict) == (2, 0, "lower")
    assert ranked[0].auc.value == 1 and ranked[-1].auc.value == 0
    assert {one.auc.verdict for one in ranked[1:3]} == {"not resolved"}
    bins = octave(planted.position_N)
    for one in ranked:
        gate = gates[(0, 2).index(one.layer), :, one.stream]
        wins = [
            float(gate[i] > gate[j]) + 0.5 * float(gate[i] == gate[j])
            for i in np.flatnonzero(entities.final_N)
            for j in np.flatnonzero(~entities.inside_N)
            if bins[i] == bins[j]
        ]
        assert one.auc.value == pytest.approx(np.mean(wins))
        assert one.gate_mean == pytest.approx(gate.mean(), rel=1e-5)
        assert one.open_share == pytest.approx((gate > 0.5).mean())


def test_models_without_gates_are_refused() -> None:
    for changes in ({"memory": None}, {"memory": MEMORY | {"gate": None}}):
        with pytest.raises(UserError, match="this model has no gates"):
            read_gates(build(**changes), [[1]])


def test_command_on_documents(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "gates"
    arguments = ["gates", "--checkpoint", str(run_folder), "--documents", "5", "--length", "20", "--show", "2"]
    assert main([*arguments, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [str(out / name) for name in ("gates.html", "gates.parquet", "gates_by_stream.csv")]
    table = pq.read_table(out / "gates.parquet").to_pydict()
    assert set(table["document"]) == set(range(5)) and max(table["position"]) == 19
    assert len(table["gate"]) == 5 * 20 * 2 * 2
    rows = list(csv.DictReader(io.StringIO((out / "gates_by_stream.csv").read_text())))
    assert sorted((row["layer"], row["stream"]) for row in rows) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    means = {(row["layer"], row["stream"]): float(row["gate_mean"]) for row in rows}
    here = [
        gate
        for gate, layer, g in zip(table["gate"], table["layer"], table["stream"], strict=True)
        if (layer, g) == (1, 0)
    ]
    assert means["1", "0"] == pytest.approx(np.mean(here), rel=1e-6)
    assert {path.suffix for path in out.iterdir()} >= {".png", ".pdf", ".svg", ".csv", ".html", ".parquet", ".json"}
    page = (out / "gates.html").read_text()
    # All layers and streams of the first two documents, in the order of the table.
    labels = re.findall(r"<span>layer (\d), stream (\d): AUC", page)
    assert labels == [(row["layer"], row["stream"]) for row in rows] * 2
    assert "Document 1" in page and "Document 2" not in page and "http" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--documents", "3", "--out", "page.html"], "name a folder with --out"),
        (["--documents", "3", "--out", "FILE"], "name a folder with --out"),
        (["--documents", "3", "--out", "x", "--length", "1"], "has no document of at least 2 tokens"),
    ],
)
def test_command_refuses(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (tmp_path / "FILE").write_text("kept")
    arguments = [str(tmp_path / name) if name in ("page.html", "FILE", "x") else name for name in arguments]
    assert main(["gates", "--checkpoint", str(run_folder), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_text_and_documents_exclude_each_other(capsys: pytest.CaptureFixture) -> None:
    for source in ([], ["--text", "a", "--documents", "2"]):
        with pytest.raises(SystemExit):
            main(["gates", "--checkpoint", "x", "--out", "y", *source])
        capsys.readouterr()
