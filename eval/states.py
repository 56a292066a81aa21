"""Captured states of many tokens: how many fit at once, and merged as the model merges its streams in the end.

Legend: n tokens, G residual streams, D hidden, V vocabulary.
"""

from torch import Tensor

from engram.config import ModelConfig
from engram.model.transformer import Transformer

# Logits of one chunk: 2^20 float32 values are 4 MiB, of which a few stay in a CPU's caches; fewer tokens than 128 would
# not pay for reading the head.
_CHUNK_LOGITS, _CHUNK_TOKENS = 2**20, 128
# Numbers of all captured states of one batch: 2^26 float32 values are 256 MiB.
_STATES = 2**26
_MAX_TOKENS = 4096


def batch_tokens(config: ModelConfig, places: int) -> int:
    """Tokens whose states at so many places fit into a quarter of a GiB."""
    return min(_MAX_TOKENS, max(1, _STATES // (places * config.hc_mult * config.hidden_size)))


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at once."""
    return max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size)


def merged_states(model: Transformer, x_nGD: Tensor) -> Tensor:
    """States [n, D] of single tokens."""
    return model.merge(x_nGD.unsqueeze(0)).squeeze(0)
