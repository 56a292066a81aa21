"""SwiGLU feed-forward layer: down(silu(gate x) * up x)."""

from torch import Tensor, nn
from torch.nn import functional as F

from engram.model.linear import Linear


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2, width)
        self.down = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
