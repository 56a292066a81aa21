"""The whole model: causality by gradient, equal paths, isolation, initialisation, compiled equality."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engram.config import ModelConfig
from engram.memory.vocabulary import VocabularyMap
from engram.model.transformer import Transformer

ATTENTION = dict(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MOE = dict(num_experts=4, top_k=2, expert_dim=16, num_dense_layers=1)
TABLES = dict(num_heads=2, head_dim=8, rows_per_head=67)
BASE = dict(num_layers=3, hidden_size=32, vocab_size=61, attention=ATTENTION)
VARIANTS = {
    "dense": BASE,
    "moe": BASE | dict(moe=MOE),
    "engram": BASE | dict(moe=MOE, hyper_connection={}, memory=TABLES | dict(layer_ids=[1, 2])),
    "engram_one_stream": BASE | dict(memory=TABLES | dict(layer_ids=[0], max_ngram_size=4)),
    "single_fusion": BASE | dict(hyper_connection={}, memory=TABLES | dict(layer_ids=[1], fusion="single")),
    "v4_1": BASE | dict(hyper_connection={}, memory=TABLES | dict(layer_ids=[1], max_ngram_size=4, conv=None)),
    "over_encoding": BASE | dict(moe=MOE, hyper_connection={}, over_encoding=TABLES),
}


def _model(variant: str, **changes: object) -> Transformer:
    model = Transformer(ModelConfig(**{**VARIANTS[variant], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the initial values, where convolutions and gates would be trivial.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _tokens(batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_causality_by_gradient(variant: str) -> None:
    """The embedding of token s has gradient on the logits at t exactly when s <= t."""
    model = _model(variant)
    tokens = _tokens(1, 13)
    captured = []
    model.embed.register_forward_hook(lambda module, inputs, output: captured.append(output))
    logits = model(tokens)
    captured[0].retain_grad()
    for position in (0, 6, 12):
        captured[0].grad = None
        logits[0, position].square().sum().backward(retain_graph=True)
        reached = captured[0].grad[0].abs().sum(-1)
        assert (reached[: position + 1] > 0).all()
        assert (reached[position + 1 :] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_no_earlier_logits(variant: str) -> None:
    """Hash ids carry no gradient, so the same is asked of the values."""
    model = _model(variant)
    tokens = _tokens()
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :11], before[:, :11], atol=1e-5, rtol=1e-5)
    assert (after[:, 11] - before[:, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_do_not_depend_on_the_batch(variant: str) -> None:
    model = _model(variant)
    tokens, targets = _tokens(8), _tokens(8)
    together = model.token_losses(tokens, targets)
    for row in range(8):
        alone = model.token_losses(tokens[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["moe", "engram"])
def test_loss_is_the_cross_entropy_of_the_logits(variant: str) -> None:
    model = _model(variant)
    tokens, targets = _tokens(), _tokens()
    targets[0, 3:9] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model.loss(tokens, targets), expected)
    assert (model.token_losses(tokens, targets)[0, 3:9] == 0).all()


def test_balance_loss_counts_in_training_only() -> None:
    model = _model("moe", moe=MOE | dict(sequence_balance_loss=0.5))
    tokens, targets = _tokens(), _tokens()
    plain = model.loss(tokens, targets)
    model.train()
    # Two MoE layers, each near 0.5 for routing that is near even.
    assert 0.9 < (model.loss(tokens, targets) - plain).item() < 2.0
    model.eval()
    torch.testing.assert_close(model.loss(tokens, targets), plain)


def test_documents_isolate_look_back_and_attention_each_by_its_own_switch() -> None:
    tokens = _tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    other_start = tokens.clone()
    other_start[:, :5] = (other_start[:, :5] + 7) % 61

    def changes(model: Transformer) -> torch.Tensor:
        difference = model(tokens, documents) - model(other_start, documents)
        return difference.abs().amax(-1)[0, 5:] > 1e-6

    isolated = ATTENTION | dict(isolate_documents=True)
    # conv=None: the convolution mixes across documents by design.
    inside = TABLES | dict(layer_ids=[1], conv=None)
    crossing = inside | dict(look_back="sequence")
    assert not changes(_model("engram", attention=isolated, memory=inside)).any()
    # A trigram reaches back over two positions.
    seen = changes(_model("engram", num_layers=2, attention=isolated, memory=crossing))
    assert seen[:2].all()
    assert changes(_model("engram", memory=inside)).all()


def test_rows_of_later_layers_come_from_the_shared_list_of_primes() -> None:
    model = _model("engram")
    sizes = model.hasher.vocab_sizes
    assert len({prime for layer in sizes.values() for order in layer for prime in order}) == 8
    assert [block.memory.embed.weight.shape[0] for block in model.blocks[1:]] == list(model.hasher.num_rows.values())


def test_vocabulary_map_travels_with_the_weights_and_decides_the_rows() -> None:
    table = np.arange(61)
    table[40:] = np.arange(21)
    config = ModelConfig(**VARIANTS["engram"])
    mapped = Transformer(config, VocabularyMap(table))
    assert torch.equal(mapped.state_dict()["token_map"], torch.from_numpy(table))
    tokens = torch.full((1, 4), 3)
    twin = torch.full((1, 4), 43)
    rows, twin_rows = mapped.hash_ids(tokens), mapped.hash_ids(twin)
    assert all(torch.equal(rows[layer], twin_rows[layer]) for layer in (1, 2))
    raw = Transformer(config.replace(memory=config.memory.replace(compression=False)), VocabularyMap(table))
    assert not torch.equal(raw.hash_ids(tokens)[1], raw.hash_ids(twin)[1])


@pytest.mark.parametrize("variant", ["engram", "over_encoding"])
def test_loaded_weights_bring_their_map(variant: str) -> None:
    table = np.arange(61)
    table[40:] = np.arange(21)
    config = ModelConfig(**VARIANTS[variant])
    mapped, other = Transformer(config, VocabularyMap(table)).eval(), Transformer(config).eval()
    tokens = _tokens()
    other.load_state_dict(mapped.state_dict())
    assert other.vocabulary.digest == mapped.vocabulary.digest
    assert torch.equal(other(tokens), mapped(tokens))


def test_map_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="covers 60 token ids, but model.vocab_size is 61"):
        Transformer(ModelConfig(**BASE), VocabularyMap(np.arange(60)))


@pytest.mark.parametrize("variant", ["engram", "over_encoding"])
def test_checkpointed_activations_give_equal_gradients_and_loads(variant: str) -> None:
    model = _model(variant, moe=MOE | dict(sequence_balance_loss=0.1)).train()
    tokens, targets = _tokens(), _tokens()
    gradients, loads = [], []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        model.loss(tokens, targets).backward()
        loads.append(model.blocks[1].ffn.router.load.clone())
        model.update_router_bias()
        for block in model.blocks:
            # Neither counted twice nor kept: a second graph would hold all activations.
            assert block.balance_loss is None
            if block.ffn is not model.blocks[0].ffn:
                block.ffn.router.bias.zero_()
        gradients.append({name: p.grad.to_dense().clone() for name, p in model.named_parameters()})
    assert torch.equal(loads[0], loads[1]) and loads[0].sum() == 2 * 19 * 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_is_near_float32_and_parameters_stay_float32() -> None:
    model = _model("engram")
    tokens, targets = _tokens(4, 33), _tokens(4, 33)
    exact = model.loss(tokens, targets)
    model.compute_dtype = torch.bfloat16
    assert model.hidden(tokens).dtype == torch.bfloat16
    assert model(tokens).dtype == torch.float32
    rounded = model.loss(tokens, targets)
    rounded.backward()
    assert abs(rounded.item() - exact.item()) < 0.02
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_initial_values_follow_the_table() -> None:
    config = ModelConfig(
        **VARIANTS["engram"] | dict(hidden_size=128, vocab_size=500, num_layers=8),
    )
    parameters = dict(Transformer(config).named_parameters())
    spreads = {
        "embed.weight": 0.02,
        "head.weight": 0.02,
        "blocks.1.attn.q_proj.weight": 0.02,
        "blocks.1.attn.o_proj.weight": 0.02 / 4,
        "blocks.0.ffn.gate_up.weight": 0.02,
        "blocks.0.ffn.down.weight": 0.02 / 4,
        "blocks.2.ffn.experts.gate_up": 0.02,
        "blocks.2.ffn.experts.down": 0.02 / 4,
        "blocks.1.memory.embed.weight": 0.02,
        "blocks.1.memory.wkv.weight": 0.02,
        "blocks.1.attn_connection.weight": 0.02,
    }
    for name, spread in spreads.items():
        assert parameters[name].std().item() == pytest.approx(spread, rel=0.1), name
        assert abs(parameters[name].mean().item()) < spread / 10, name
    for name in ("norm.weight", "blocks.3.attn_norm.weight", "blocks.1.memory.q_weight", "blocks.1.memory.conv_norm"):
        assert (parameters[name] == 1).all(), name
    assert (parameters["blocks.1.memory.conv.weight"] == 0).all()
    assert (parameters["blocks.1.attn_connection.scale"] == 0.01).all()


def test_one_seed_gives_one_model() -> None:
    config = ModelConfig(**VARIANTS["engram"])
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(Transformer(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["embed.weight"], models[2]["embed.weight"])


def test_compiled_blocks_equal_eager_ones() -> None:
    """The one compiled test: losses and every gradient by name, over two batches so that nothing is specialised."""
    eager = _model("engram").train()
    compiled = Transformer(eager.config).train()
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_blocks()
    for _ in range(2):
        tokens, targets = _tokens(2, 16), _tokens(2, 16)
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            loss = model.loss(tokens, targets)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        actual = dict(compiled.named_parameters())
        for name, parameter in eager.named_parameters():
            want, got = parameter.grad.to_dense(), actual[name].grad.to_dense()
            error = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
            assert error < 1e-3, f"gradient of {name}: relative error {error:.2e}"
    assert torch.equal(eager.blocks[1].ffn.router.load, compiled.blocks[1].ffn.router.load)
