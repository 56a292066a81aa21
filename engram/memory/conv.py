"""The parameters of the short dilated causal convolution over the gated value (Engram, equation 5)."""

import math

import torch
from torch import nn

from engram.config import ConvConfig


class ShortConv(nn.Module):
    """SiLU(depthwise_conv(rmsnorm(value))), every stream and channel on its own; `weight` [G*D, 1, K].

    `engram_gate_conv` computes it together with the gate. It mixes across documents: where that matters, documents
    belong into sequences of their own.
    """

    def __init__(self, config: ConvConfig, *, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.zeros(channels, 1, config.kernel_size))
        if not config.zero_init:
            nn.init.uniform_(self.weight, -1 / math.sqrt(config.kernel_size), 1 / math.sqrt(config.kernel_size))

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.weight.shape[-1]}, dilation={self.dilation}"
