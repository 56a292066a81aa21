"""Captured states against the model's own forward pass, and that nothing stays behind."""

import pytest
import torch
from torch import Tensor

from engram.model.hyper_connection import expand
from engram.model.transformer import Block
from eval.capture import Capture
from tests.eval.models import MEMORY, build


def tokens() -> Tensor:
    return torch.randint(50, (2, 11))


@pytest.mark.parametrize("changes", [{}, {"hyper_connection": None}, {"memory": MEMORY | {"fusion": "single"}}])
def test_states_are_those_of_the_forward_pass(changes: dict[str, object]) -> None:
    """Walk the blocks by hand, sublayer by sublayer."""
    model, ids = build(**changes), tokens()
    points = ["resid_pre", "resid_memory", "resid_mid", "resid_post", "memory_out", "attn_out", "ffn_out"]
    with torch.no_grad(), Capture(model, points) as seen:
        logits = model(ids)
        hash_ids = model.hash_ids(ids)
        rope, mask = model._positions(ids, None)
        x = expand(model.embed_tokens(ids), model.config.hc_mult)
        assert seen.layers("memory_out") == [1]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            torch.testing.assert_close(seen["resid_pre", layer], x, rtol=0, atol=0)
            if block.memory is not None:
                out = seen["memory_out", layer]
                single = block.memory_connection is not None
                x = block.memory_connection(x, lambda u, out=out: out.squeeze(2)) if single else x + out
                if not single:
                    torch.testing.assert_close(out, block.memory(seen["resid_pre", layer], hash_ids[layer]))
            torch.testing.assert_close(seen["resid_memory", layer], x)
            x = block.attn_connection(x, lambda u, block=block: block.attn(block.attn_norm(u), rope, mask))
            torch.testing.assert_close(seen["resid_mid", layer], x)
            x = block.ffn_connection(x, lambda u, layer=layer: seen["ffn_out", layer])
            torch.testing.assert_close(seen["resid_post", layer], x)
            assert seen["attn_out", layer].shape == (2, 11, 16)
        torch.testing.assert_close(model.unembed(x), logits)


def test_gates_and_expert_choices() -> None:
    model, ids = build(), tokens()
    with torch.no_grad(), Capture(model, ["gates", "experts", "expert_weights", "resid_pre"]) as seen:
        model(ids)
        block = model.blocks[1]
        assert isinstance(block, Block) and block.memory is not None
        expected = block.memory.gates(seen["resid_pre", 1], model.hash_ids(ids)[1])
    torch.testing.assert_close(seen["gates", 1], expected)
    assert seen.layers("experts") == [1, 2] == seen.layers("expert_weights")
    assert seen["experts", 1].shape == (2, 11, 2) and seen["experts", 1].max() < 4
    scale = block.ffn.router.config.routed_scaling_factor
    torch.testing.assert_close(seen["expert_weights", 2].sum(-1), torch.full((2, 11), scale))
    # Choices steer the output: the experts chosen are those whose weights move it.
    ffn = model.blocks[2].ffn
    unused = sorted(set(range(4)) - set(seen["experts", 2].flatten().tolist()))
    with torch.no_grad():
        before = model(ids)
        ffn.experts.down[unused] += 1
        torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
        ffn.experts.down[int(seen["experts", 2][0, 0, 0])] += 1
        assert not torch.equal(model(ids), before)


def test_only_what_was_asked_for_and_nothing_afterwards() -> None:
    model, ids = build(), tokens()
    with Capture(model, ["resid_post"], layers=[2]) as seen:
        model(ids)
    assert ("resid_post", 2) in seen and ("resid_post", 1) not in seen and ("resid_pre", 2) not in seen
    assert not seen["resid_post", 2].requires_grad
    seen.clear()
    model(ids)
    assert seen.layers("resid_post") == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
