"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one low-rank latent per token.

Legend: B batch, T tokens, S tokens so far, D hidden, H heads, N / R query-key dimensions without / with rotation, P =
R / 2, L latent, E = L + R, V value dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.config import AttentionConfig
from engram.kernels.causal_attention import causal_attention
from engram.kernels.products import widened
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
        """`rope`: cosines and sines [T, P]. `mask`: bool [B, 1, T, T], True where attended; None is causal."""
        c = self.config
        q_nope, q_rope = self._queries(x_BTD, rope)
        latent, k_rope = self._latents(x_BTD, rope)
        kv_BTHx = self.kv_b_proj(latent).unflatten(-1, (c.num_heads, -1))
        k_nope, v_BTHV = kv_BTHx.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)

        # One rotated key part serves all heads.
        k_rope = k_rope.expand(-1, -1, c.num_heads, -1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        out = causal_attention(q, k, v_BTHV.transpose(1, 2), mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def entries(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What later tokens need of these: latent and rotated key [B, T, L + R]."""
        latent, k_rope = self._latents(x_BTD, rope)
        return torch.cat((latent, k_rope.squeeze(2)), dim=-1)

    def over_entries(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], entries_BSE: Tensor, mask_TS: Tensor | None
    ) -> Tensor:
        """What `forward` gives for the last T of S tokens, of which all have left their `entries`. No mask: T = S or 1.

        The projection from latents to keys is applied to the queries instead, and the one to values to the weighted sum
        of latents: no key or value of an earlier token is ever computed again.
        """
        heads, nope, rank = self.config.num_heads, self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q_nope, q_rope = self._queries(x_BTD, rope)
        up_HxL = self.kv_b_proj.weight.to(x_BTD.dtype).unflatten(0, (heads, -1))
        q_latent = torch.einsum("bthn,hnl->bthl", *widened(q_nope, up_HxL[:, :nope])).to(x_BTD.dtype)
        q_BHTE = torch.cat((q_latent, q_rope), dim=-1).transpose(1, 2)
        q_BHTE, entries_BHSE = widened(q_BHTE, entries_BSE[:, None].expand(-1, heads, -1, -1))
        causal = mask_TS is None and x_BTD.shape[1] > 1
        sum_BHTE = F.scaled_dot_product_attention(
            q_BHTE, entries_BHSE, entries_BHSE, attn_mask=mask_TS, is_causal=causal, scale=self.scale
        ).to(x_BTD.dtype)
        out = torch.einsum("bhtl,hvl->bthv", *widened(sum_BHTE[..., :rank], up_HxL[:, nope:]))
        return self.o_proj(out.flatten(2).to(x_BTD.dtype))

    def _queries(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, H, N] and, rotated, [B, T, H, R]."""
        c = self.config
        low_rank = c.q_lora_rank is not None
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BTD))) if low_rank else self.q_proj(x_BTD)
        nope, rotated = q.unflatten(-1, (c.num_heads, -1)).split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return nope, apply_rope(rotated, *rope)

    def _latents(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, L] and, rotated, [B, T, 1, R]."""
        c = self.config
        latent, k_rope = self.kv_a_proj(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self.kv_a_norm(latent), apply_rope(k_rope.unsqueeze(2), *rope)
