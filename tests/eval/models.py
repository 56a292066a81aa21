"""A tiny model of every part, for tests of what looks inside."""

from engram.config import ModelConfig
from engram.model.transformer import Transformer

ATTENTION = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
MEMORY = {"layer_ids": [1], "num_heads": 2, "head_dim": 4, "rows_per_head": 97}


def build(**changes: object) -> Transformer:
    settings = {
        "num_layers": 3,
        "hidden_size": 16,
        "vocab_size": 50,
        "attention": ATTENTION,
        "moe": {"num_experts": 4, "top_k": 2, "expert_dim": 8, "num_dense_layers": 1},
        "hyper_connection": {"hc_mult": 2},
        "memory": MEMORY,
    }
    return Transformer(ModelConfig(**settings | changes)).eval()
