"""Small configs for plans: odd sizes, every part of a model, settings merged key by key."""

from typing import Any

from engram.config import Config, parse_config
from engram.config_file import merge

TREE: dict[str, Any] = {
    "run_dir": "runs/none",
    "model": {
        "num_layers": 3,
        "hidden_size": 16,
        "vocab_size": 61,
        "attention": {
            "num_heads": 2,
            "kv_lora_rank": 5,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
        "moe": {"num_experts": 6, "top_k": 2, "expert_dim": 5},
        "hyper_connection": {"hc_mult": 2},
        "memory": {"layer_ids": [1, 2], "num_heads": 3, "head_dim": 3, "rows_per_head": 31},
    },
    "data": {"path": "runs/none", "sequence_length": 9},
    "optim": {},
    "train": {"steps": 1, "batch_size": 24, "micro_batch_size": 2},
    "eval": {"batch_size": 1},
    "distributed": {},
}


def tiny(**changes: Any) -> Config:
    """TREE with sections replaced key by key; None switches one off."""
    return parse_config(merge(TREE, changes))
