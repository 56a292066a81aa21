"""The specification of `engram_gate_conv` in plain torch.

Letters: B batch, T tokens, G streams, D hidden size, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def engram_gate_conv_ref(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    conv_weight: Tensor | None,
    conv_gain: Tensor | None,
    *,
    gate: str | None,
    dilation: int,
    eps: float,
    conv_eps: float,
) -> tuple[Tensor, Tensor]:
    streams, width = hidden.shape[-2:]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # Selected, not multiplied by zero: a dead token's values may be anything, and 0 * inf is NaN.
    value_BTD = torch.where(alive[..., None], keys_and_value[..., -width:], 0).to(wide)
    gates_BTG = alive[..., None].to(wide).expand(hidden.shape[:-1])
    if gate is not None:
        assert gain is not None
        alive_BT11 = alive[..., None, None]
        hidden_BTGD = torch.where(alive_BT11, hidden, 0).to(wide)
        keys_BTGD = torch.where(alive_BT11, keys_and_value[..., :-width].unflatten(-1, (streams, width)), 0).to(wide)
        dot_BTG = torch.linalg.vecdot(hidden_BTGD, keys_BTGD * gain)
        # One factor for each norm: their product would underflow before the root for tiny eps.
        score_BTG = dot_BTG * _inverse_rms(hidden_BTGD, eps) * _inverse_rms(keys_BTGD, eps) * width**-0.5
        if gate == "signed_sqrt":
            score_BTG = torch.copysign(score_BTG.abs().clamp(min=1e-6).sqrt(), score_BTG)
        gates_BTG = torch.where(alive[..., None], score_BTG.sigmoid(), 0)
    gated_BTGD = gates_BTG[..., None] * value_BTD[..., None, :]
    out_BTGD = gated_BTGD
    if conv_weight is not None:
        assert conv_gain is not None
        normed_BTGD = gated_BTGD * _inverse_rms(gated_BTGD, conv_eps)[..., None] * conv_gain
        out_BTGD = gated_BTGD + F.silu(_causal_conv(normed_BTGD, conv_weight.view(streams, width, -1), dilation))
    return out_BTGD.to(hidden.dtype), gates_BTG.detach().to(torch.float32)


def _causal_conv(x_BTGD: Tensor, weight_GDK: Tensor, dilation: int) -> Tensor:
    """out[t] = sum over taps j of weight[..., j] x[t - (K - 1 - j) dilation]; the last tap is the current token."""
    length, taps = x_BTGD.shape[1], weight_GDK.shape[-1]
    padded_BTGD = F.pad(x_BTGD, (0, 0, 0, 0, (taps - 1) * dilation, 0))
    out_BTGD = x_BTGD * weight_GDK[..., -1]
    for tap in range(taps - 1):
        early_BTGD = padded_BTGD[:, tap * dilation : tap * dilation + length]
        out_BTGD = torch.addcmul(out_BTGD, early_BTGD, weight_GDK[..., tap])
    return out_BTGD


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x) / x.shape[-1] + eps)
