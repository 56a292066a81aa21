"""Rows -> what the gate weighs: one key for each stream, and the value that all of them share."""

import torch
from torch import nn

from engram.kernels.products import linear


def keys_and_value(rows: torch.Tensor, projection: nn.Linear, *, value_only: int | None = None) -> torch.Tensor:
    """rows [B, T, M] -> [B, T, (G+1)*D] in their dtype, keys of the streams first.

    `value_only`: the value's width D, where no gate looks at the keys: they are not computed.
    """
    used = slice(None) if value_only is None else slice(-value_only, None)
    bias = None if projection.bias is None else projection.bias[used].to(rows.dtype)
    return linear(rows, projection.weight[used].to(rows.dtype), bias)
