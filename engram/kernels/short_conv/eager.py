"""Shifted multiply-adds in place, with the backward written out: no padded copy, no gradient per shifted view.

On one CPU core in float32, forward and backward together take about half the time of `F.conv1d`.
"""

from collections.abc import Iterator
from typing import Any

import torch


def short_conv_eager(x: torch.Tensor, weight: torch.Tensor, *, dilation: int) -> torch.Tensor:
    return _ShortConv.apply(x, weight, dilation)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        out = x * weight[..., -1]
        for tap, early, late in _lags(x.shape[1], weight.shape[-1], dilation):
            out[:, late].addcmul_(x[:, early], weight[..., tap])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad * weight[..., -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[..., -1] = (grad * x).sum((0, 1))
        for tap, early, late in _lags(x.shape[1], weight.shape[-1], ctx.dilation):
            grad_x[:, early].addcmul_(grad[:, late], weight[..., tap])
            grad_weight[..., tap] = (grad[:, late] * x[:, early]).sum((0, 1))
        return grad_x, grad_weight, None


def _lags(length: int, taps: int, dilation: int) -> Iterator[tuple[int, slice, slice]]:
    """Each tap that looks back less than the whole sequence: its index, where it reads, where it writes."""
    for tap in range(taps - 1):
        lag = (taps - 1 - tap) * dilation
        if lag < length:
            yield tap, slice(None, length - lag), slice(lag, None)
