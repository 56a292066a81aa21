"""The specification of `engram_gate` in plain torch. Letters: B batch, T tokens, G streams, D hidden size."""

import torch


def engram_gate_ref(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gain: torch.Tensor,
    alive: torch.Tensor,
    *,
    eps: float,
    signed_sqrt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_BTGD, key_BTGD = hidden.float(), key.float()
    width = hidden.shape[-1]
    dot_BTG = torch.linalg.vecdot(hidden_BTGD, key_BTGD * gain)
    # One factor for each norm: their product would underflow before the root for tiny eps.
    score_BTG = dot_BTG * _inverse_rms(hidden_BTGD, eps) * _inverse_rms(key_BTGD, eps) * width**-0.5
    if signed_sqrt:
        score_BTG = torch.copysign(score_BTG.abs().clamp(min=1e-6).sqrt(), score_BTG)
    # Selected, not multiplied by zero: a dead token's value may be anything, and 0 * inf is NaN.
    gate_BTG = torch.where(alive[..., None], score_BTG.sigmoid(), 0.0)
    value_BTD = torch.where(alive[..., None], value.float(), 0.0)
    return (gate_BTG[..., None] * value_BTD[..., None, :]).to(hidden.dtype), gate_BTG


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x) / x.shape[-1] + eps)
