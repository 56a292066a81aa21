"""Causal attention with all scores at once: the specification."""

import torch
from torch import Tensor


def causal(q: Tensor) -> Tensor:
    """bool [T, T]: key j is not after query i."""
    length = q.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).tril()


def causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T, masked) v; scores and softmax in float32."""
    mask = causal(q) if mask is None else mask & causal(q)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1).to(v.dtype) @ v
