"""The baseline that averages hashed n-gram rows into the input embedding (Over-Tokenized Transformer, 2501.16975)."""

import torch
from torch import nn

from engram.config import OverEncodingConfig
from engram.kernels.products import linear
from engram.memory.hashing import NgramHash
from engram.memory.table import RowTable
from engram.memory.vocabulary import VocabularyMap


class OverEncoding(nn.Module):
    """E = (E_0 + sum over orders n of P_n e_n) / (number of orders + 1), e_n the rows of the token's n-gram.

    `proj.weight` [D, d_mem] holds the P_n side by side, so that one product takes the sum. Its hash counts as layer 0.
    The model that it is part of initialises the table.
    """

    def __init__(self, config: OverEncodingConfig, *, hidden_size: int, vocabulary: VocabularyMap) -> None:
        super().__init__()
        self.config = config
        self.hasher = NgramHash.from_config(config, vocabulary, layer_ids=(0,))
        self.scale = 1 / (len(config.orders) + 1)
        self.embed = RowTable(self.hasher.num_rows[0], config.head_dim, dtype=getattr(torch, config.table_dtype))
        self.proj = nn.Linear(config.d_mem, hidden_size, bias=False)

    def forward(
        self, embedded: torch.Tensor, compressed_ids: torch.Tensor, document_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """embedded tokens E_0 [B, T, D], ids and document ids int64 [B, T] -> [B, T, D] in `embedded.dtype`."""
        hash_ids = self.hasher(compressed_ids, document_ids)[0]
        rows = self.embed(hash_ids, embedded.dtype)
        return self.scale * (embedded + linear(rows, self.proj.weight.to(embedded.dtype)))
