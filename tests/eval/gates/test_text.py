"""The heat map shows the model's own gates, each at its token, layer and stream."""

import csv
import io
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from engram.config import UserError
from engram.report.figure import to_csv
from eval.gates import text as gates
from eval.loading import Loaded, load

TEXT = "the people of café & <b>"


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> Loaded:
    return load(run_folder, device="cpu")


def found_in(loaded: Loaded) -> tuple[list[int], gates.Gates]:
    ids = loaded.encode(TEXT)
    return ids, gates.measure(loaded.model, ids, gates.token_texts(loaded.tokenizer, ids))


@torch.no_grad()
def test_gates_are_those_of_the_forward_pass(loaded: Loaded) -> None:
    """Recomputed from the paper's equation, on hidden states of a hand-run forward pass."""
    ids, found = found_in(loaded)
    model, tokens = loaded.model, torch.tensor([ids])
    hash_ids = model.hash_ids(tokens)
    # Layer 0 reads the embedding, the same in every stream.
    hidden = model.embed(tokens)[0].double()
    memory = model.blocks[0].memory
    rows = memory.embed.weight[hash_ids[0][0]].flatten(1).double()
    keys = (rows @ memory.wkv.weight.double().T)[:, : 2 * 16].unflatten(1, (2, 16))
    normed_hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    normed_keys = keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + 1e-6)
    score = torch.einsum(
        "td,gd,tgd,gd->tg", normed_hidden, memory.q_weight.double(), normed_keys, memory.k_weight.double()
    )
    score = score / 4
    expected = torch.sigmoid(torch.copysign(score.abs().clamp(min=1e-6).sqrt(), score))
    torch.testing.assert_close(found.gates_LTG[0].double(), expected, rtol=1e-4, atol=1e-5)

    added = memory(model.embed(tokens).unsqueeze(2).expand(-1, -1, 2, -1), hash_ids[0])[0]
    ratio = added.norm(dim=-1) / hidden.float().norm(dim=-1)[:, None]
    torch.testing.assert_close(found.relative_LTG[0], ratio, rtol=1e-4, atol=1e-6)
    assert found.layers == [0, 1] and found.gates_LTG.shape == (2, len(ids), 2)
    # Nothing stays behind on the model.
    assert not memory._forward_hooks


def test_html_shows_each_token_with_its_value(loaded: Loaded) -> None:
    ids, found = found_in(loaded)
    cells = re.findall(r'<span style="--value: ([\d.]+)" title="([^"]*)">(.*?)</span>', found.html())
    expected = [(layer, stream, t) for layer in (0, 1) for stream in (0, 1) for t in range(len(ids))]
    assert len(cells) == len(expected)
    for (value, title, text), (layer, stream, t) in zip(cells, expected, strict=True):
        gate, relative = float(found.gates_LTG[layer, t, stream]), float(found.relative_LTG[layer, t, stream])
        assert float(value) == pytest.approx(gate, abs=6e-4)
        assert title == f"gate {gate:.3f}, adds {relative:.3f} of the stream"
        assert unescape(text) == found.tokens[t]
    assert "".join(found.tokens).replace("<0xC3><0xA9>", "é").strip() == TEXT
    for layer in (0, 1):
        for stream in (0, 1):
            assert (
                f"layer {layer}, stream {stream}: mean {found.gates_LTG[layer, :, stream].mean():.2f}" in found.html()
            )


def test_table_has_one_row_per_token_layer_and_stream(loaded: Loaded) -> None:
    ids, found = found_in(loaded)
    rows = list(csv.DictReader(io.StringIO(to_csv(found.columns()))))
    assert len(rows) == 2 * len(ids) * 2
    for row in rows:
        place = found.layers.index(int(row["layer"])), int(row["position"]), int(row["stream"])
        assert float(row["gate"]) == float(found.gates_LTG[place])
        assert float(row["relative_output"]) == float(found.relative_LTG[place])
        assert row["token"] == found.tokens[place[1]]


def test_models_without_gates_and_empty_texts(loaded: Loaded, baseline_folder: Path) -> None:
    with pytest.raises(UserError, match="model.memory is null"):
        gates.measure(load(baseline_folder, device="cpu").model, [1], ["a"])
    with pytest.raises(UserError, match="the text is empty"):
        gates.measure(loaded.model, [], [])
