"""Contributions and skipped blocks against a walk by hand, and on blocks whose effect is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.model.hyper_connection import expand
from engram.model.transformer import Block, Transformer
from eval.depth import contributions as effective_depth
from eval.depth.contributions import Depth, Part, measure, parts
from tests.eval.models import MEMORY
from tests.eval.planted import documents, lively, plain, plant


def walk(model: Transformer, document: list[int], without: int | None = None) -> tuple[list[dict[str, Tensor]], Tensor]:
    """States around every part of every block, and the log-probabilities, in double where nothing else is needed."""
    tokens = torch.tensor([document[:-1]])
    hash_ids, (rope, mask) = model.hash_ids(tokens), model._positions(tokens, None)
    x = expand(model.embed_tokens(tokens), model.config.hc_mult)
    states = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        found = {"start": x}
        if layer != without:
            if block.memory is not None:
                x = block._remember(x, hash_ids[layer])
            found["memory"] = x
            x = block.attn_connection(x, lambda u, block=block: block.attend(u, rope, mask))
            found["attention"] = x
            x = block.ffn_connection(x, block.feed)
            found["ffn"] = x
        states.append({name: value[0].flatten(1).double() for name, value in found.items()})
    return states, torch.log_softmax(model.unembed(x)[0].double(), -1)


def length(x: Tensor) -> float:
    return math.sqrt(math.fsum(value * value for value in x.tolist()))


@torch.no_grad()
def naive(model: Transformer, document: list[int]) -> tuple[list[float], list[float], list[float], list[list[float]]]:
    """size and cosine of each part, KL and changes of each skipped block, token by token."""
    states, logp = walk(model, document)
    tokens, layers = range(len(document) - 1), range(len(states))
    ends = {"block": ("start", "ffn"), "memory": ("start", "memory"), "attention": ("memory", "attention")}
    ends["ffn"] = ("attention", "ffn")
    size, cosine = [], []
    for part in parts(model.config):
        before, after = (states[part.layer][name] for name in ends[part.name])
        size.append(math.fsum(length(after[t] - before[t]) / length(before[t]) for t in tokens))
        dots = [float((after[t] - before[t]) @ before[t]) for t in tokens]
        cosine.append(math.fsum(dots[t] / length(after[t] - before[t]) / length(before[t]) for t in tokens))
    kl, change = [], []
    for skipped in layers:
        other, logq = walk(model, document, skipped)
        kl.append(math.fsum((logp.exp() * (logp - logq)).flatten().tolist()))
        row = [math.nan] * (skipped + 1)
        for later in layers[skipped + 1 :]:
            old, new = (s[later]["ffn"] - s[later]["start"] for s in (states, other))
            row.append(math.fsum(length(new[t] - old[t]) / length(old[t]) for t in tokens))
        change.append(row)
    return size, cosine, kl, change


@pytest.mark.parametrize("changes", [{}, {"hyper_connection": None}, {"memory": MEMORY | {"fusion": "single"}}])
def test_equals_a_walk_by_hand(changes: dict[str, object]) -> None:
    model, texts = lively(0.2, **changes), documents((9, 2, 12))
    found = measure(model, texts)
    for index, text in enumerate(texts):
        size, cosine, kl, change = naive(model, text)
        np.testing.assert_allclose(found.size[index], size, rtol=1e-4)
        np.testing.assert_allclose(found.cosine[index], cosine, atol=1e-4)
        np.testing.assert_allclose(found.skipped_kl[index], kl, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.change[index], change, rtol=1e-3)
    assert found.counts.tolist() == [8, 1, 11]
    assert [part for part in found.parts if part.name == "memory"] == [Part(1, "memory")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def means(depth: Depth) -> dict[str, np.ndarray]:
    names = ("size", "cosine", "skipped_kl", "change")
    return {name: getattr(depth, name).sum(0) / depth.counts.sum() for name in names}


def test_identity_blocks_have_no_effect() -> None:
    model, texts = lively(num_layers=5), documents((30, 20))
    for layer in (3, 4):
        plant(model, layer, lambda x: x)
    depth = measure(model, texts)
    found = means(depth)
    blocks = [depth.parts.index(Part(layer, "block")) for layer in range(5)]
    assert (found["size"][blocks[:3]] > 0.1).all() and (found["size"][blocks[3:]] == 0).all()
    assert (found["cosine"][blocks[3:]] == 0).all()
    assert (found["skipped_kl"][:3] > 1e-3).all() and np.abs(found["skipped_kl"][3:]).max() < 1e-6
    # Nothing changes in a block that adds nothing, whatever was skipped before it.
    assert found["change"][0, 1] > 0.01 and found["change"][3, 4] == 0 and found["change"][0, 3] == 0


def test_sizes_and_cosines_of_planted_blocks() -> None:
    """x -> 1.5 x adds half of x; x -> -x / 2 takes one and a half away; the final norm sees neither scale."""
    model, texts = plain(4), documents()
    plant(model, 2, lambda x: 1.5 * x)
    plant(model, 3, lambda x: -x / 2)
    depth = measure(model, texts)
    found = means(depth)
    for layer, size, cosine in ((2, 0.5, 1.0), (3, 1.5, -1.0)):
        index = depth.parts.index(Part(layer, "block"))
        assert found["size"][index] == pytest.approx(size, rel=1e-5)
        assert found["cosine"][index] == pytest.approx(cosine, rel=1e-5)
    assert abs(found["skipped_kl"][2]) < 1e-4 < found["skipped_kl"][3]
    # Without x -> 1.5 x, what the next block adds is a third smaller.
    assert found["change"][2, 3] == pytest.approx(1 / 3, rel=1e-5)


def test_batches_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = lively(), documents((9, 2, 17, 5, 30))
    together, alone = measure(model, texts), [measure(model, [text]) for text in texts]
    monkeypatch.setattr(effective_depth, "chunk_tokens", lambda vocab_size: 7)
    monkeypatch.setattr(effective_depth, "batch_tokens", lambda config, places: 20)
    seen: list[int] = []
    parted = measure(model, texts, advance=seen.append)
    assert sum(seen) == 58 and len(seen) > 2
    for name in ("size", "cosine", "skipped_kl", "change"):
        expected = np.concatenate([getattr(depth, name) for depth in alone])
        np.testing.assert_allclose(getattr(together, name), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(getattr(parted, name), expected, rtol=1e-3, atol=1e-4)
