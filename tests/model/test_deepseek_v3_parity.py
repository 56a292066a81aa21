"""With memory and hyper-connections off, the model is DeepSeek-V3: equal logits and gradients on copied weights."""

import pytest
import torch

from engram.config import ModelConfig
from engram.model.transformer import Transformer

pytest.importorskip("transformers", reason="parity with transformers needs the `bench` extra")
from tests.reference.deepseek_v3 import _public_tensors, public_model

SHAPES = {
    "odd_sizes": dict(
        num_layers=3,
        hidden_size=40,
        vocab_size=67,
        attention=dict(num_heads=3, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=10),
        moe=dict(num_experts=5, top_k=2, expert_dim=24, num_shared_experts=1, num_dense_layers=1),
    ),
    "query_bottleneck_and_groups": dict(
        num_layers=2,
        hidden_size=32,
        vocab_size=50,
        attention=dict(
            num_heads=2, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
        ),
        moe=dict(
            num_experts=8,
            top_k=3,
            expert_dim=16,
            num_shared_experts=2,
            num_dense_layers=1,
            num_groups=4,
            top_k_groups=2,
            routed_scaling_factor=2.5,
        ),
    ),
    "yarn": dict(
        num_layers=2,
        hidden_size=48,
        vocab_size=31,
        attention=dict(
            num_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=8,
            yarn=dict(factor=10, original_max_position=32, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.9),
        ),
        # With one expert for each token, whose weight is 1, the router's gradient would be nothing but rounding.
        moe=dict(num_experts=4, top_k=2, expert_dim=16, num_shared_experts=1, num_dense_layers=0),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 37])
def test_logits_and_gradients_equal_deepseek_v3(shape: str, length: int) -> None:
    model = Transformer(ModelConfig(**SHAPES[shape])).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Larger than the initial values, so that routing, attention and norms are far from trivial.
            tensor.add_(torch.randn_like(tensor) * (0.3 if "norm" in name else 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    public = public_model(model)
    tokens = torch.randint(0, model.config.vocab_size, (2, length))

    ours, theirs = model(tokens), public(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    public_gradients = {name: parameter.grad for name, parameter in public.named_parameters()}
    for name, parameter in model.named_parameters():
        for public_name, gradient in _public_tensors(name, parameter.grad).items():
            expected = public_gradients.pop(public_name)
            error = (gradient - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error < 1e-3, f"gradient of {name}: relative error {error:.2e}"
    assert not public_gradients
