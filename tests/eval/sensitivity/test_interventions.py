"""Each change of the memory against a model that has it built in, or against loops; and that nothing stays behind."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.capture import Capture
from eval.sensitivity.interventions import MODES, Mode, Reference, intervened, read_reference
from tests.eval.models import MEMORY, build

TWO_LAYERS = MEMORY | {"layer_ids": [1, 2], "max_ngram_size": 4, "num_heads": 3}


def lively(**changes: object) -> Transformer:
    """With convolution weights, gains and biases that are not at their start."""
    model = build(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".memory." in name:
                weight.copy_(torch.randn_like(weight) * (1.0 if "embed" in name else 0.3))
    return model


def tokens(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randint(50, (batch, length))


def reference(model: Transformer) -> Reference:
    return read_reference(model, [torch.randint(50, (length,)).tolist() for length in (9, 20, 3, 31)])


def memory(model: Transformer, layer: int = 1) -> Any:
    return cast(Any, model.blocks[layer]).memory


def rows_read(model: Transformer, ids: Tensor, layer: int, *args: Any, **options: Any) -> Tensor:
    """Rows [B, T, H, W] that a layer gets under an intervention."""
    seen = []
    with torch.no_grad(), intervened(model, *args, **options):
        handle = memory(model, layer).embed.register_forward_hook(lambda _, inputs, output: seen.append(output))
        try:
            model(ids)
        finally:
            handle.remove()
    return seen[0].unflatten(-1, (-1, model.config.memory.head_dim))


@torch.no_grad()
def twin(model: Transformer, **changes: object) -> Transformer:
    """Another config with the same weights, as far as it has them."""
    other = build(**changes)
    missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    return other


@torch.no_grad()
def test_zero_embedding_is_a_table_of_zeros() -> None:
    model, ids = lively(), tokens()
    zero = twin(model)
    memory(zero).embed.weight.zero_()
    with intervened(model, "zero_embedding"):
        off = model(ids)
    torch.testing.assert_close(off, zero(ids), rtol=0, atol=0)
    assert not torch.equal(off, model(ids))


@torch.no_grad()
def test_zero_output_is_the_model_without_memory() -> None:
    model, ids = lively(memory=TWO_LAYERS), tokens()
    without = twin(model, memory=None)
    with intervened(model, "zero_output"):
        torch.testing.assert_close(model(ids), without(ids), rtol=0, atol=0)
    # Of one layer: the weights of the other stay in use.
    one = twin(model, memory=TWO_LAYERS)
    memory(one, 2).wkv.weight.zero_()
    with intervened(model, "zero_output", layers=[2]):
        torch.testing.assert_close(model(ids), one(ids))


@torch.no_grad()
def test_zero_rows_are_no_zero_output_where_projections_have_a_bias() -> None:
    model, ids = lively(memory=MEMORY | {"projection_bias": True}), tokens()
    outputs: dict[str, Tensor] = {}
    modes: tuple[Mode, ...] = ("zero_embedding", "zero_output")
    for mode in modes:
        with intervened(model, mode), Capture(model, ["resid_post"]) as seen:
            model(ids)
            outputs[mode] = seen["resid_post", 1]
    assert (outputs["zero_embedding"] - outputs["zero_output"]).abs().max() > 0.1
    # Without the bias they are the same.
    model = lively()
    logits = []
    for mode in modes:
        with intervened(model, mode):
            logits.append(model(ids))
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@torch.no_grad()
def test_gate_one_is_the_config_without_a_gate() -> None:
    model, ids = lively(), tokens()
    ungated = twin(model, memory=MEMORY | {"gate": None})
    with intervened(model, "gate_one"):
        torch.testing.assert_close(model(ids), ungated(ids), rtol=0, atol=0)
    assert model.config.memory is not None and memory(model).config.gate == "signed_sqrt"


def test_the_reference_is_what_its_documents_read_one_by_one() -> None:
    model = lively(memory=TWO_LAYERS)
    documents = [torch.randint(50, (length,)).tolist() for length in (5, 1, 12)]
    found = read_reference(model, documents, max_tokens=24)
    for layer in (1, 2):
        ids = torch.cat([model.hash_ids(torch.tensor([document]))[layer][0] for document in documents])
        assert sorted(map(tuple, found.addresses[layer].tolist())) == sorted(map(tuple, ids.tolist()))
        manual = torch.zeros(9, 4, dtype=torch.float64)
        for column in range(9):
            for row in ids[:, column].tolist():
                manual[column] += memory(model, layer).embed.weight[row].detach().double() / len(ids)
        torch.testing.assert_close(found.means[layer].double(), manual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["zero_embedding", "mean", "shuffled"])
@pytest.mark.parametrize(
    ("parts", "chosen"),
    [
        ({}, range(9)),
        ({"orders": [3]}, (3, 4, 5)),
        ({"heads": [0, 2]}, (0, 2, 3, 5, 6, 8)),
        ({"orders": [2, 4], "heads": [1]}, (1, 7)),
    ],
)
def test_only_the_chosen_columns_change(mode: Mode, parts: dict[str, Any], chosen: tuple[int, ...]) -> None:
    model, ids = lively(memory=TWO_LAYERS), tokens()
    texts = reference(model)
    rows = memory(model).embed.weight.detach()
    own = model.hash_ids(ids)[1]
    found = rows_read(model, ids, 1, mode, layers=[1], reference=texts, **parts)
    donors = [set(texts.addresses[1][:, column].tolist()) for column in range(9)]
    for b in range(3):
        for t in range(13):
            for column in range(9):
                expected = rows[own[b, t, column]]
                if column not in chosen:
                    torch.testing.assert_close(found[b, t, column], expected, rtol=0, atol=0)
                elif mode == "zero_embedding":
                    assert not found[b, t, column].any()
                elif mode == "mean":
                    torch.testing.assert_close(found[b, t, column], texts.means[1][column], rtol=0, atol=0)
                else:
                    assert any(torch.equal(found[b, t, column], rows[row]) for row in donors[column])
    # The other layer is left alone.
    untouched = rows_read(model, ids, 2, mode, layers=[1], reference=texts, **parts)
    other = memory(model, 2).embed.weight.detach()[model.hash_ids(ids)[2]]
    torch.testing.assert_close(untouched, other, rtol=0, atol=0)


def test_shuffled_n_grams_move_as_wholes_to_others_wherever_they_stand() -> None:
    model = lively(memory=TWO_LAYERS)
    texts, ids = reference(model), tokens(1, 40)
    found = rows_read(model, ids, 1, "shuffled", reference=texts)[0]
    rows = memory(model).embed.weight.detach()
    whole = rows[texts.addresses[1]]
    own = rows[model.hash_ids(ids)[1]][0]
    moved = 0
    for t in range(40):
        for order in range(3):
            heads = slice(3 * order, 3 * order + 3)
            assert (whole[:, heads] == found[t, heads]).flatten(1).all(1).any()
            moved += not torch.equal(found[t, heads], own[t, heads])
    assert moved > 110
    # Beside padding and other rows, and in another batch: the same.
    wide = torch.cat([torch.cat([ids, tokens(1, 5)], dim=1), tokens(2, 45)])
    again = rows_read(model, wide, 1, "shuffled", reference=texts)[0, :40]
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_shuffled_keeps_the_statistics_of_the_rows_that_are_read() -> None:
    """Frequent rows that are five times as long stay as frequent."""
    model = lively()
    documents = [torch.randint(6 if index % 2 else 50, (200,)).tolist() for index in range(30)]
    texts = read_reference(model, documents)
    frequent = texts.addresses[1].flatten().unique(return_counts=True)
    with torch.no_grad():
        memory(model).embed.weight[frequent[0][frequent[1] > 60]] *= 5
    ids = torch.tensor(documents)
    norms = memory(model).embed.weight.detach()[model.hash_ids(ids)[1]].norm(dim=-1)
    shuffled = rows_read(model, ids, 1, "shuffled", reference=texts).norm(dim=-1)
    assert shuffled.mean().item() == pytest.approx(norms.mean().item(), rel=0.05)
    assert shuffled.std().item() == pytest.approx(norms.std().item(), rel=0.1)
    # A uniform draw of rows would not keep them.
    assert memory(model).embed.weight.norm(dim=-1).mean() < 0.8 * norms.mean()


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_as_it_was_afterwards_even_after_an_error(mode: Mode) -> None:
    model, ids = lively(), tokens()
    before, weights = model(ids), {name: weight.clone() for name, weight in model.state_dict().items()}
    texts = reference(model)
    with intervened(model, mode, reference=texts):
        assert not torch.equal(model(ids), before)
    with pytest.raises(RuntimeError, match="planted"), intervened(model, mode, reference=texts):
        raise RuntimeError("planted")
    torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_decoding_token_by_token_sees_the_same_change() -> None:
    from engram.inference.cache import Decoder

    model, ids = lively(), tokens(2, 7)
    texts = reference(model)
    modes: tuple[Mode, ...] = ("mean", "shuffled", "gate_one")
    for mode in modes:
        with intervened(model, mode, reference=texts):
            decoder = Decoder(model, 2, 7)
            steps = [decoder.feed(ids[:, t : t + 1]) for t in range(7)]
            torch.testing.assert_close(steps[-1].flatten(), model(ids)[:, -1].flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "parts", "message"),
    [
        ("zero_embeding", {}, "did you mean 'zero_embedding'"),
        ("xyz", {}, "there is no mode 'xyz' \\(modes: zero_embedding"),
        ("zero_output", {"layers": [0]}, "layer 0 has no memory to change: memory stands in layers 1"),
        ("mean", {"orders": [4]}, "order 4 has no memory to change: n-grams have the orders 2, 3"),
        ("mean", {"heads": [-1]}, "head -1 has no memory to change: each order has the heads 0, 1"),
        ("zero_output", {"orders": [2]}, "what all orders and heads of a layer make together"),
        ("gate_one", {"heads": [0]}, "choose among zero_embedding, mean, shuffled"),
        ("shuffled", {}, "give a reference"),
    ],
)
def test_what_cannot_be_done_is_refused(mode: Any, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message), intervened(build(), mode, **parts):
        pass


def test_models_without_memory_or_gate_are_refused() -> None:
    with pytest.raises(UserError, match="has no memory to switch off"), intervened(build(memory=None), "zero_output"):
        pass
    ungated = build(memory=MEMORY | {"gate": None})
    with pytest.raises(UserError, match="opens gates, but this model has none"), intervened(ungated, "gate_one"):
        pass
