"""The memory module: hash ids and hidden states -> what memory adds to each stream.

Letters: B batch, T tokens, H columns (orders * heads), M = d_mem, G streams, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import nn

from engram.config import MemoryConfig
from engram.kernels.engram_gate_conv import engram_gate_conv
from engram.memory.conv import ShortConv
from engram.memory.gate import keys_and_value
from engram.memory.mapped_table import MappedTable
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable


class Engram(nn.Module):
    """Y = v + conv(v) with v = gate(hidden, W_K e) * W_V e, where e are the rows that the token's n-grams hash to.

    One table and one value serve all streams; each stream has its own key and gate (Engram, section 2.4). The caller
    adds the result to the streams. Projections run in the dtype of `hidden`, gates in float32.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        layer_id: int,
        hidden_size: int,
        hc_mult: int,
        num_rows: int,
        table: Callable[..., RowTable | StagedTable | MappedTable] = RowTable,
    ) -> None:
        """`table` makes what holds the rows, of RowTable's arguments."""
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        gains = torch.zeros if config.zero_centred_gains else torch.ones
        self.embed = table(
            num_rows, config.head_dim, init_std=config.init_std, dtype=getattr(torch, config.table_dtype)
        )
        # Rows of the matrix: keys of stream 0 to hc_mult-1, then the value.
        self.wkv = nn.Linear(config.d_mem, (hc_mult + 1) * hidden_size, bias=config.projection_bias)
        nn.init.normal_(self.wkv.weight, std=config.d_mem**-0.5)
        if config.projection_bias:
            nn.init.zeros_(self.wkv.bias)
        self.q_weight = nn.Parameter(gains(hc_mult, hidden_size))
        self.k_weight = nn.Parameter(gains(hc_mult, hidden_size))
        self.conv: ShortConv | None = None
        if config.conv is not None:
            self.conv = ShortConv(
                config.conv,
                channels=hc_mult * hidden_size,
                dilation=config.conv.dilation or config.max_ngram_size,
            )
            self.conv_norm = nn.Parameter(gains(hc_mult, hidden_size))

    def forward(self, hidden: torch.Tensor, hash_ids: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, G, D], hash ids with offsets int64 [B, T, H] (-1: dead) -> [B, T, G, D] in `hidden.dtype`."""
        rows_BTM = self.embed(hash_ids, hidden.dtype)
        return self.fuse(hidden, rows_BTM, (hash_ids >= 0).any(-1))

    def fuse(self, hidden: torch.Tensor, rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Everything after the look-up: rows [B, T, M] in `hidden.dtype`, alive bool [B, T] -> [B, T, G, D]."""
        return self._gate(hidden, rows, alive, self.conv)[0]

    def gates(self, hidden: torch.Tensor, hash_ids: torch.Tensor) -> torch.Tensor:
        """How far each stream opens to memory: [B, T, G] float32, 0 for dead tokens. Without a gradient."""
        rows_BTM = self.embed(hash_ids, hidden.dtype)
        return self._gate(hidden, rows_BTM, (hash_ids >= 0).any(-1), conv=None)[1]

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """What the gates weigh: rows [B, T, M] -> [B, T, D] in their dtype."""
        return keys_and_value(rows, self.wkv, value_only=self.q_weight.shape[-1])

    def _gate(
        self, hidden: torch.Tensor, rows: torch.Tensor, alive: torch.Tensor, conv: ShortConv | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """value = gate(hidden, rows); value + conv(value): one operation gives this and the gates."""
        config = self.config
        gated = config.gate is not None
        return engram_gate_conv(
            hidden,
            keys_and_value(rows, self.wkv, value_only=None if gated else hidden.shape[-1]),
            alive,
            gain=self._gain(self.q_weight) * self._gain(self.k_weight) if gated else None,
            conv_weight=conv.weight if conv else None,
            conv_gain=self._gain(self.conv_norm) if conv else None,
            gate=config.gate,
            dilation=conv.dilation if conv else 1,
            eps=config.norm_eps,
            conv_eps=config.conv_norm_eps,
        )

    def _gain(self, weight: torch.Tensor) -> torch.Tensor:
        return 1 + weight if self.config.zero_centred_gains else weight
