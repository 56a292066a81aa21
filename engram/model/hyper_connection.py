"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): G residual streams around every sublayer.

    u = h_pre x,   y = sublayer(u),   x' = h_res x + h_post y

h_res is doubly stochastic up to Sinkhorn's convergence, so the residual path neither grows nor shrinks; its rows sum to
1 exactly, because they are what the mix sums over. Legend: B batch, T tokens, G streams, D hidden.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engram.config import HyperConnectionConfig
from engram.kernels.mhc_pre_post import mhc_coefficients_ref, mhc_post, mhc_pre_carry
from engram.kernels.products import linear


def expand(x_BTD: Tensor, hc_mult: int) -> Tensor:
    """Every stream starts as a copy: [B, T, G, D]."""
    return x_BTD.unsqueeze(2).repeat(1, 1, hc_mult, 1)


class HyperConnection(nn.Module):
    """Reads one input from the streams, writes a sublayer's output to all of them, and mixes them.

    Parameters: weight [2G + G^2, G D], scale [3] and bias [2G + G^2] for h_pre, h_post, h_res in this order.
    """

    def __init__(self, config: HyperConnectionConfig, hidden_size: int, norm_eps: float, index: int) -> None:
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        streams = config.hc_mult
        outputs = 2 * streams + streams**2
        self.weight = nn.Parameter(torch.empty(outputs, streams * hidden_size))
        self.scale = nn.Parameter(torch.full((3,), config.gate_init))
        self.bias = nn.Parameter(torch.empty(outputs))
        # Sublayers take turns in which stream they read most.
        self.first_stream = index % streams

    def initial_bias(self) -> Tensor:
        """h_pre sums to 1 and prefers one stream, h_post = 1, h_res is near the identity.

        Zero biases would make h_res uniform and erase every difference between streams in one layer.
        """
        streams = self.config.hc_mult
        if streams == 1:
            # sigmoid(4.6) = 0.99.
            h_pre = torch.tensor([4.6])
        else:
            rest = 0.3 / (streams - 1)
            h_pre = torch.full((streams,), math.log(rest / (1 - rest)))
            h_pre[self.first_stream] = math.log(0.7 / 0.3)
        h_res = self.config.residual_bias * torch.eye(streams)
        return torch.cat((h_pre, torch.zeros(streams), h_res.flatten()))

    def coefficients(self, x_BTGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h_pre [B, T, G], h_post [B, T, G], h_res [B, T, G out, G in], float32: to look at, not to train through."""
        steps = self.config.sinkhorn_steps
        return mhc_coefficients_ref(x_BTGD, self.weight, self.scale, self.bias, steps=steps, eps=self.norm_eps)

    def forward(self, x_BTGD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        u_BTD, h_post, h_res, x_BTGD = mhc_pre_carry(
            x_BTGD, self.weight, self.scale, self.bias, steps=self.config.sinkhorn_steps, eps=self.norm_eps
        )
        return mhc_post(x_BTGD, sublayer(u_BTD), h_post, h_res)


class ResidualConnection(nn.Module):
    """The plain residual stream: x + sublayer(x), with one stream."""

    def forward(self, x_BTGD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x_BTGD + sublayer(x_BTGD.squeeze(2)).unsqueeze(2)


class Readout(nn.Module):
    """Learned weighted sum of the streams before the final norm: weight [G, G D], scale [1], bias [G]."""

    def __init__(self, config: HyperConnectionConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        streams = config.hc_mult
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.empty(streams, streams * hidden_size))
        self.scale = nn.Parameter(torch.full((1,), config.gate_init))
        self.bias = nn.Parameter(torch.empty(streams))

    def initial_bias(self) -> Tensor:
        """The plain mean of all streams: sigmoid(b) = 1 / G, or 0.99 for one stream."""
        streams = len(self.bias)
        return torch.full((streams,), -math.log(streams - 1) if streams > 1 else 4.6)

    def forward(self, x_BTGD: Tensor) -> Tensor:
        flat = x_BTGD.flatten(2)
        # The norm is a scalar of the token, so it follows the product.
        inverse_rms = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + self.norm_eps)
        logits = linear(flat, self.weight.to(flat.dtype)).float() * inverse_rms * self.scale + self.bias
        return (torch.sigmoid(logits).to(x_BTGD.dtype).unsqueeze(-1) * x_BTGD).sum(2)
