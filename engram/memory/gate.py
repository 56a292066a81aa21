"""Rows, hidden -> gated value per stream. Letters: B batch, T tokens, G streams, D hidden size, C = (G+1)*D."""

import torch

from engram.config import MemoryConfig
from engram.kernels.engram_gate import engram_gate


def gated_value(
    hidden: torch.Tensor,
    keys_and_value: torch.Tensor,
    alive: torch.Tensor,
    q_gain: torch.Tensor,
    k_gain: torch.Tensor,
    config: MemoryConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One value for all streams, weighed by how well each stream's hidden state matches its key.

    `hidden` [B, T, G, D]; `keys_and_value` [B, T, (G+1)*D], keys of the streams first; `alive` bool [B, T]; gains
    [G, D]. Returns the gated value [B, T, G, D] and the gates [B, T, G] in float32. Without a gate (`config.gate` null)
    all gates are 1. Dead tokens have gate and value 0.
    """
    streams, width = hidden.shape[-2:]
    keys_BTC, value_BTD = keys_and_value.split([streams * width, width], dim=-1)
    if config.gate is None:
        value_BTD = torch.where(alive[..., None], value_BTD, 0.0)
        gate_BT1 = alive[..., None].float()
        return value_BTD[..., None, :].expand_as(hidden), gate_BT1.expand(hidden.shape[:-1])
    return engram_gate(
        hidden,
        keys_BTC.unflatten(-1, (streams, width)),
        value_BTD,
        q_gain * k_gain,
        alive,
        eps=config.norm_eps,
        signed_sqrt=config.gate == "signed_sqrt",
    )
