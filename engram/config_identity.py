"""Which settings make a run the run that it is, and a short name for all of them together.

Two configs with the same `run_id` train the same model on the same tokens, up to the order of floating-point sums.
"""

import hashlib
import json
from typing import Any

from engram.config import Config

# Settings that a later call on the same run folder may change without changing a single weight ...
FREE = (
    "run_dir",
    "eval",
    "data.path",
    "data.cache",
    "data.prefetch",
    "train.stop_after",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.async_checkpoints",
    "train.statistics_every",
    "train.skip_nonfinite",
    "train.tables",
    "train.wandb",
)
# ... and those that change only the order of floating-point sums.
ROUNDING = (
    "train.threads",
    "train.device",
    "train.compile",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "distributed",
)
# Free for a run folder, but runs are compared by it.
MEASURE = ("eval.tokens",)


def within(key: str, names: tuple[str, ...]) -> bool:
    """Whether the dotted `key` is one of `names`, or lies below one of them."""
    return any(key == name or key.startswith(name + ".") for name in names)


def matters(key: str) -> bool:
    """Whether the dotted `key` is part of what a run is: runs that differ in it are different runs."""
    return within(key, MEASURE) or not within(key, FREE + ROUNDING)


def semantic_settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting that matters and differs from its default.

    Defaults are left out, so that a setting which the code learns later does not rename the runs made before.
    """
    flat = _flatten(config.model_dump(mode="json", exclude_defaults=True))
    return {key: value for key, value in flat.items() if matters(key)}


def run_id(config: Config) -> str:
    """12 hexadecimal digits of the SHA-256 of the semantic settings as canonical JSON."""
    text = json.dumps(semantic_settings(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        # An empty section is a value: `memory: {}` is not `memory: null`.
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
