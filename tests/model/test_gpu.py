"""The whole model on a GPU against the CPU in float32: loss, and every gradient by name."""

import copy

import pytest
import torch
from torch import Tensor

from engram.config import ModelConfig
from engram.data.loader import Batch
from engram.model.evaluation import validation_loss
from engram.model.transformer import IGNORE, Transformer

pytestmark = pytest.mark.gpu

VOCABULARY = 97
ATTENTION = {"num_heads": 3, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
MEMORY = {"layer_ids": [0, 2], "num_heads": 2, "head_dim": 16, "rows_per_head": 101, "conv": {"zero_init": False}}
VARIANTS = {
    "dense": {},
    "experts": {"moe": {"num_experts": 5, "top_k": 2, "expert_dim": 24, "sequence_balance_loss": 0.01}},
    "memory": {"memory": MEMORY},
    "four-grams without conv": {"hyper_connection": {}, "memory": {**MEMORY, "max_ngram_size": 4, "conv": None}},
    "single fusion": {"hyper_connection": {}, "memory": {**MEMORY, "fusion": "single"}},
    "everything": {
        "attention": {**ATTENTION, "q_lora_rank": 14, "isolate_documents": True},
        "moe": {"num_experts": 5, "top_k": 2, "expert_dim": 24},
        "hyper_connection": {"hc_mult": 4},
        "memory": MEMORY,
        "over_encoding": {"num_heads": 1, "head_dim": 16, "rows_per_head": 101},
    },
}


def build(variant: str) -> Transformer:
    sizes = {"num_layers": 3, "hidden_size": 48, "vocab_size": VOCABULARY, "attention": ATTENTION}
    model = Transformer(ModelConfig(**{**sizes, **VARIANTS[variant]})).train()
    with torch.no_grad():
        # Away from the start, where many parts are still switched off.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch() -> Batch:
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3, 37))
    targets[0, 5:9] = IGNORE
    return Batch(tokens, targets, (torch.arange(37) > 20).long().expand(3, -1))


def loss_and_gradients(model: Transformer, inputs: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = model.loss(*inputs)
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), {name: (g.to_dense() if g.is_sparse else g).double().cpu() for name, g in gradients.items()}


def assert_same_gradients(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    assert there.keys() == here.keys()
    whole = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in here.values()]))
    for name, expected in here.items():
        difference = (there[name] - expected).norm()
        # Gradients of single numbers are sums in which almost everything cancels: they count against the whole.
        assert difference <= 1e-4 * expected.norm() + 1e-6 * whole, f"{name}: {difference / expected.norm():.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant: str) -> None:
    model, inputs = build(variant), batch()
    there = copy.deepcopy(model).cuda()
    expected_loss, expected = loss_and_gradients(model, inputs)
    loss, gradients = loss_and_gradients(there, inputs.to("cuda"))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(gradients, expected)


def test_checkpointed_activations_change_nothing() -> None:
    model, inputs = build("everything").cuda(), batch().to("cuda")
    other = copy.deepcopy(model)
    other.activation_checkpointing = True
    expected_loss, expected = loss_and_gradients(model, inputs)
    loss, gradients = loss_and_gradients(other, inputs)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)
    assert torch.equal(model.blocks[1].ffn.router.load, other.blocks[1].ffn.router.load)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_validation_loss(dtype: torch.dtype, tolerance: float) -> None:
    model, batches = build("everything"), [batch(), batch()]
    expected = validation_loss(model, batches, torch.device("cpu"))
    there = copy.deepcopy(model).cuda()
    there.compute_dtype = dtype
    assert validation_loss(there, batches, torch.device("cuda")) == pytest.approx(expected, rel=tolerance)
