"""`transformers`' DeepSeek-V3 in the shape of one of our models, trained as fast as it can be: bfloat16 parameters,
float32 masters."""

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from engram.config import ModelConfig

EXPERT_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


def deepseek_v3(config: ModelConfig, experts: str) -> DeepseekV3ForCausalLM:
    """Same layers, widths, heads, experts and vocabulary as `config` without memory and hyper-connections."""
    attention, moe = config.attention, config.moe
    assert moe is not None and moe.shared_width == moe.num_shared_experts * moe.expert_dim
    public = DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        intermediate_size=config.dense_width,
        moe_intermediate_size=moe.expert_dim,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.num_shared_experts,
        num_experts_per_tok=moe.top_k,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=moe.num_dense_layers,
        routed_scaling_factor=moe.routed_scaling_factor,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        tie_word_embeddings=False,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    model = DeepseekV3ForCausalLM(public).to(torch.bfloat16).train()
    model.set_experts_implementation(experts)
    return model


class MasterAdamW:
    """torch's fused AdamW on float32 masters of parameters of any dtype."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)


def peer_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
