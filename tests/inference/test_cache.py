"""Feeding a model in parts equals one forward pass: every part of the cache, alone and together."""

import pytest
import torch

from engram.config import ModelConfig
from engram.inference.cache import Decoder
from engram.model.transformer import Transformer

BASE = {
    "num_layers": 3,
    "hidden_size": 24,
    "vocab_size": 61,
    "attention": {"num_heads": 3, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}
MEMORY = {"layer_ids": [0, 2], "num_heads": 2, "head_dim": 5, "rows_per_head": 53, "conv": {"zero_init": False}}
VARIANTS = {
    "dense": {},
    "low-rank queries": {"attention": {**BASE["attention"], "q_lora_rank": 7}},
    "yarn": {"attention": {**BASE["attention"], "yarn": {"factor": 4, "original_max_position": 16}}},
    "experts": {"moe": {"num_experts": 5, "top_k": 2, "expert_dim": 9}},
    "memory": {"memory": MEMORY},
    "memory without conv": {"memory": {**MEMORY, "conv": None, "max_ngram_size": 4}},
    "memory of raw tokens up to eos": {"memory": {**MEMORY, "compression": False, "look_back": "eos"}},
    "over-encoding": {"over_encoding": {"num_heads": 2, "head_dim": 5, "rows_per_head": 53, "max_ngram_size": 5}},
    "streams": {"hyper_connection": {"hc_mult": 3}},
    "streams and memory": {"hyper_connection": {"hc_mult": 3}, "memory": MEMORY},
    "single fusion": {"hyper_connection": {"hc_mult": 3}, "memory": {**MEMORY, "fusion": "single"}},
    "everything": {
        "moe": {"num_experts": 5, "top_k": 2, "expert_dim": 9},
        "hyper_connection": {"hc_mult": 2},
        "memory": MEMORY,
        "over_encoding": {"num_heads": 1, "head_dim": 5, "rows_per_head": 53},
    },
}


def build(variant: str) -> Transformer:
    model = Transformer(ModelConfig(**{**BASE, **VARIANTS[variant]})).eval()
    with torch.no_grad():
        # Away from the start, where many parts are still switched off.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parts_equal_one_forward_pass(variant: str) -> None:
    model = build(variant)
    tokens = torch.randint(0, 61, (3, 29))
    # A document's end in the middle: the token that look-back may stop at.
    tokens[:, 11] = 2
    expected = model(tokens)
    decoder, start = Decoder(model, 3, 29), 0
    for part in (1, 1, 7, 1, 2, 13, 1, 3):
        found = decoder.feed(tokens[:, start : start + part])
        start += part
        assert decoder.length == start
        torch.testing.assert_close(found, expected[:, start - 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_earlier_token_counts() -> None:
    """The comparison above could not fail if the model looked at its last token only."""
    model = build("everything")
    tokens = torch.randint(3, 61, (1, 12))
    before = model(tokens)[0, -1]
    for position in range(11):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 61
        assert (model(changed)[0, -1] - before).abs().max() > 1e-3


def test_a_full_cache_takes_no_more() -> None:
    decoder = Decoder(build("dense"), 1, 4)
    with torch.no_grad(), pytest.raises(AssertionError, match="5 tokens do not fit into a cache of 4"):
        decoder.feed(torch.zeros(1, 5, dtype=torch.int64))


@torch.no_grad()
def test_bfloat16_stays_close_to_float32() -> None:
    model = build("streams and memory")
    tokens = torch.randint(0, 61, (2, 17))
    expected = model(tokens)[:, -1]
    model.compute_dtype = torch.bfloat16
    decoder = Decoder(model, 2, 17)
    decoder.feed(tokens[:, :9])
    for position in range(9, 17):
        found = decoder.feed(tokens[:, position : position + 1])
    assert found.dtype == torch.float32
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < 0.05


@torch.no_grad()
def test_positions_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(build("yarn"), 1, 9)
    monkeypatch.setattr("engram.inference.cache.rope_tables", lambda *_: pytest.fail("worked out again"))
    for _ in range(3):
        decoder.feed(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_branches_go_on_from_what_their_row_was_fed(variant: str) -> None:
    """Also branches of branches, and the states of all new tokens instead of the last logits."""
    model = build(variant)
    tokens = torch.randint(0, 61, (2, 23))
    decoder = Decoder(model, 2, 13)
    decoder.feed(tokens[:, :13])
    rows, endings = torch.tensor([1, 0, 1, 1]), torch.randint(0, 61, (4, 7))
    first = decoder.branch(rows, 18)
    states = [first.hidden(endings[:, :5])]
    again = torch.tensor([3, 0])
    second = first.branch(again, 20)
    states.append(second.hidden(endings[again, 5:]))

    whole = model.hidden(torch.cat((tokens[rows, :13], endings), dim=1))
    torch.testing.assert_close(states[0], whole[:, 13:18], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1], whole[again, 18:], rtol=1e-4, atol=1e-4)
    # Branches leave the decoder that they came from as it was.
    torch.testing.assert_close(
        decoder.branch(torch.tensor([0]), 14).feed(tokens[:1, 13:14]),
        model(tokens[:1, :14])[:, -1],
        rtol=1e-4,
        atol=1e-4,
    )
