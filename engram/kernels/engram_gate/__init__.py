"""Context-aware gate of a memory's value, one for each stream (Engram, equations 3-4)."""

from typing import Literal

import torch

from engram.kernels.engram_gate.reference import engram_gate_ref


def engram_gate(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gain: torch.Tensor,
    alive: torch.Tensor,
    *,
    eps: float,
    signed_sqrt: bool,
    impl: Literal["auto", "reference"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = <rms(h) * gain, rms(k)> / sqrt(D);  gate = sigmoid(copysign(sqrt(max(|s|, 1e-6)), s)), or sigmoid(s)

    `hidden`, `key` [B, T, G, D]; `value` [B, T, D], shared by the streams; `gain` [G, D], the product of both norms'
    gains; `alive` bool [B, T]: elsewhere gate and gated value are 0, whatever key and value hold. float32 inside.
    Returns the gated value [B, T, G, D] in `hidden.dtype` and the gate [B, T, G] in float32.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"engram_gate has no implementation {impl!r}: choose 'auto' or 'reference'")
    return engram_gate_ref(hidden, key, value, gain, alive, eps=eps, signed_sqrt=signed_sqrt)
