"""Sweep files over a model that is counted, and seldom built."""

from pathlib import Path
from typing import Any

import yaml

from engram.sweep.spec import Sweep, load_sweep

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 3,
        "hidden_size": 64,
        "vocab_size": 256,
        "attention": dict(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        "moe": dict(num_experts=18, top_k=2, expert_dim=32, num_shared_experts=2),
        "memory": dict(layer_ids=[1], num_heads=2, head_dim=8, rows_per_head=100),
    },
    "data": {"path": "data/small", "sequence_length": 16},
    "train": {"steps": 10, "batch_size": 4},
}


def write_sweep(folder: Path, *, base: dict[str, Any] | None = None, **settings: Any) -> Path:
    """`folder/sweep.yaml` and its base beside it; pool and results lie in `folder` too."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base or BASE))
    tree = {"base": "base.yaml", "pool": str(folder / "pool"), "out": str(folder / "out"), **settings}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def make_sweep(folder: Path, **settings: Any) -> Sweep:
    return load_sweep(write_sweep(folder, **settings))
