"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one low-rank latent per token.

Legend: B batch, T tokens, D hidden, H heads, N / R query-key dimensions without / with rotation, V value dimension.
"""

import torch
from torch import Tensor, nn

from engram.config import AttentionConfig
from engram.kernels.causal_attention import causal_attention
from engram.model.linear import Linear
from engram.model.norm import RMSNorm
from engram.model.rope import apply_rope, softmax_scale


class Attention(nn.Module):
    def __init__(self, config: AttentionConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        width = config.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, width)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, width)
        self.kv_a_proj = Linear(hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, config.num_heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(config.num_heads * config.v_head_dim, hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """`rope`: cosines and sines [T, R / 2]. `mask`: bool [B, 1, T, T], True where attended; None is causal."""
        c = self.config
        q_BTHx = self.queries(x_BTD).unflatten(-1, (c.num_heads, c.qk_head_dim))
        q_nope, q_rope = q_BTHx.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_proj(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv_BTHx = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (c.num_heads, -1))
        k_nope, v_BTHV = kv_BTHx.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)

        # One rotated key part serves all heads.
        k_rope = apply_rope(k_rope.unsqueeze(2), *rope).expand(-1, -1, c.num_heads, -1)
        q = torch.cat((q_nope, apply_rope(q_rope, *rope)), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        out = causal_attention(q, k, v_BTHV.transpose(1, 2), mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, H (N + R)], each head's part without rotation first; nothing is rotated yet."""
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BTD)))
