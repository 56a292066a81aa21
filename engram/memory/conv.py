"""Gated value -> what a short dilated causal convolution adds to it (Engram, equation 5)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from engram.config import ConvConfig
from engram.kernels.short_conv import short_conv


class ShortConv(nn.Module):
    """SiLU(depthwise_conv(rmsnorm(value))), every stream and channel on its own; `weight` [G*D, 1, K].

    It mixes across documents: where that matters, documents belong into sequences of their own.
    """

    def __init__(self, config: ConvConfig, *, channels: int, dilation: int, norm_eps: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.zeros(channels, 1, config.kernel_size))
        if not config.zero_init:
            nn.init.uniform_(self.weight, -1 / math.sqrt(config.kernel_size), 1 / math.sqrt(config.kernel_size))

    def forward(self, value: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """value [B, T, G, D], gain of the norm [G, D] -> [B, T, G, D]; float32 inside."""
        value_BTGD = value.float()
        mean_square_BTG = torch.linalg.vecdot(value_BTGD, value_BTGD) / value.shape[-1]
        normed_BTGD = value_BTGD * torch.rsqrt(mean_square_BTG + self.norm_eps)[..., None]
        # The gain is folded into the taps: one pass over the activations less.
        weight_GDK = self.weight.view(*gain.shape, -1) * gain[..., None]
        return F.silu(short_conv(normed_BTGD, weight_GDK, dilation=self.dilation)).to(value.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.weight.shape[-1]}, dilation={self.dilation}"
