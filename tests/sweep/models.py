"""Models that allocations are tried on."""

from pathlib import Path
from typing import Any

from engram.config import MemoryConfig, ModelConfig, MoEConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def small(**changes: Any) -> ModelConfig:
    """The study's model, 32 experts at rho = 1, with `memory__x` and `moe__x` changed inside their sections."""
    tree: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 128,
        "vocab_size": 512,
        "attention": {
            "num_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
        "moe": {"num_experts": 32, "top_k": 4, "expert_dim": 64, "num_shared_experts": 2},
        "hyper_connection": {"hc_mult": 4},
        "memory": {"layer_ids": [1], "num_heads": 4, "head_dim": 8, "rows_per_head": 2},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section] = {**tree[section], key: value}
        else:
            tree[section] = value
    return ModelConfig(**tree)


def paper_base(name: str, memory_of: str) -> ModelConfig:
    """A shipped model of rho = 1 with the geometry of another's memory."""
    model = load_config(CONFIGS / f"{name}.yaml").model
    return model.replace(memory=load_config(CONFIGS / f"{memory_of}.yaml").model.memory)


def axes(model: ModelConfig) -> tuple[MoEConfig, MemoryConfig]:
    assert model.moe and model.memory
    return model.moe, model.memory
