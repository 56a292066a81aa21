"""Depthwise causal dilated convolution over time (Engram, equation 5)."""

from typing import Literal

import torch

from engram.kernels.short_conv.eager import short_conv_eager
from engram.kernels.short_conv.reference import short_conv_ref


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dilation: int,
    impl: Literal["auto", "reference", "eager"] = "auto",
) -> torch.Tensor:
    """out[t] = sum over taps j of weight[..., j] * x[t - (K-1-j) * dilation]; the last tap is the current token

    `x` [B, T, G, D], `weight` [G, D, K]. Returns [B, T, G, D] in the dtype of `x`.
    """
    if impl not in ("auto", "reference", "eager"):
        raise ValueError(f"short_conv has no implementation {impl!r}: choose 'auto', 'reference' or 'eager'")
    # A compiler fuses the reference into its neighbours; the in-place version would stand in its way.
    use_eager = impl == "eager" or (impl == "auto" and not torch.compiler.is_compiling())
    return (short_conv_eager if use_eager else short_conv_ref)(x, weight, dilation=dilation)
