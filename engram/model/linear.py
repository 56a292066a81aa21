"""y = x W^T without bias; the stored weight is float32, the product runs in x's dtype."""

import torch
from torch import Tensor, nn

from engram.kernels.products import linear


class Linear(nn.Module):
    """Weight [*lead, out, in]. Leading dimensions hold independent matrices whose outputs are concatenated."""

    def __init__(self, in_features: int, *out_shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_shape, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(0, -2).to(x.dtype))
