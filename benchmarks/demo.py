"""The memory module as DeepSeek's public demo computes it, eagerly: what the fused operations are compared with.

Hashes in numpy, one modulus for one head after the other; an embedding with dense gradients; one key projection and
two norm modules for each stream; `nn.Conv1d` on channels that are transposed to and fro. It holds what is needed for
that and nothing of ours. Letters: B batch, T tokens, G streams, D hidden size, H columns (orders * heads).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def hash_demo(ids_BT: np.ndarray, multipliers: np.ndarray, primes: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """Rows within each head's own table, int64 [B, T, H], of n-grams of 2 to len(primes) + 1 compressed ids."""
    ids = np.asarray(ids_BT, dtype=np.int64)
    length = ids.shape[1]
    shifted = [np.pad(ids, ((0, 0), (back, 0)), constant_values=pad_id)[:, :length] for back in range(len(primes) + 1)]
    columns = []
    for order, heads in enumerate(primes, start=2):
        mix = shifted[0] * multipliers[0]
        for back in range(1, order):
            mix = np.bitwise_xor(mix, shifted[back] * multipliers[back])
        for prime in heads:
            columns.append((mix % int(prime)).astype(np.int64, copy=False))
    return np.stack(columns, axis=2)


class DemoShortConv(nn.Module):
    """SiLU(Conv1d(RMSNorm(x))): one norm for each stream, one depthwise convolution over the channels of all."""

    def __init__(self, hidden_size: int, hc_mult: int, kernel_size: int, dilation: int, eps: float) -> None:
        super().__init__()
        channels = hc_mult * hidden_size
        self.conv = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            groups=channels,
            bias=False,
            padding=(kernel_size - 1) * dilation,
            dilation=dilation,
        )
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=eps) for _ in range(hc_mult))

    def forward(self, x_BTGD: Tensor) -> Tensor:
        length = x_BTGD.shape[1]
        normed = torch.cat([norm(x_BTGD[:, :, stream]) for stream, norm in enumerate(self.norms)], dim=-1)
        out = torch.nn.functional.silu(self.conv(normed.transpose(1, 2))[..., :length])
        return out.transpose(1, 2).view(x_BTGD.shape).contiguous()


class DemoEngram(nn.Module):
    """hidden [B, T, G, D], compressed ids [B, T] -> [B, T, G, D]: tables, gates and convolution of one layer."""

    def __init__(
        self,
        *,
        primes: Sequence[Sequence[int]],
        multipliers: np.ndarray,
        head_dim: int,
        hidden_size: int,
        hc_mult: int,
        kernel_size: int = 4,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.primes, self.multipliers, self.pad_id = primes, multipliers, pad_id
        sizes = [prime for heads in primes for prime in heads]
        self.register_buffer("offsets", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        self.embedding = nn.Embedding(sum(sizes), head_dim)
        d_mem = len(sizes) * head_dim
        self.value_proj = nn.Linear(d_mem, hidden_size)
        self.key_projs = nn.ModuleList(nn.Linear(d_mem, hidden_size) for _ in range(hc_mult))
        eps = torch.finfo(torch.float32).eps
        self.key_norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=eps) for _ in range(hc_mult))
        self.query_norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=eps) for _ in range(hc_mult))
        self.short_conv = DemoShortConv(hidden_size, hc_mult, kernel_size, dilation=len(primes) + 1, eps=1e-5)

    def forward(self, hidden_BTGD: Tensor, ids_BT: Tensor) -> Tensor:
        hashed = torch.from_numpy(hash_demo(ids_BT.cpu().numpy(), self.multipliers, self.primes, self.pad_id))
        rows_BTM = self.embedding(hashed.to(hidden_BTGD.device) + self.get_buffer("offsets")).flatten(-2)
        gates = []
        for stream, key_proj in enumerate(self.key_projs):
            key = self.key_norms[stream](key_proj(rows_BTM))
            query = self.query_norms[stream](hidden_BTGD[:, :, stream])
            score = (key * query).sum(-1) / math.sqrt(hidden_BTGD.shape[-1])
            score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
            gates.append(score.sigmoid().unsqueeze(-1))
        value_BTGD = torch.stack(gates, dim=2) * self.value_proj(rows_BTM).unsqueeze(2)
        return value_BTGD + self.short_conv(value_BTGD)
