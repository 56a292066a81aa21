"""Causal attention by blocks of queries, each over the keys up to its end: half the scores are never computed."""

import torch
from torch import Tensor

BLOCK = 128


def causal_attention_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T, masked) v for causal masks; made for the compiler, which fuses each block's softmax."""
    length = q.shape[-2]
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        if mask is None:
            seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        else:
            seen = mask[..., start:end, :end]
        scores = (q[..., start:end, :] @ k[..., :end, :].transpose(-1, -2)).float() * scale
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).to(v.dtype)
        outputs.append(weights @ v[..., :end, :])
    return torch.cat(outputs, dim=-2)
