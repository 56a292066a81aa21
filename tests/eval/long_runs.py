"""Finished runs with a context that RULER's shortest samples fit into."""

from pathlib import Path

import torch

from engram.training.trainer import Trainer
from tests.eval.conftest import tiny_config

CONTEXT = 512


def train(workplace: Path, name: str, **changes: str) -> Path:
    """A run of two steps on rows of CONTEXT tokens, with both checkpoints."""
    settings = {
        "data.sequence_length": str(CONTEXT),
        "eval.tokens": str(CONTEXT),
        "train.batch_size": "1",
        "train.steps": "2",
        "train.eval_every": "1",
        "train.checkpoint_every": "1",
    }
    config = tiny_config(workplace, name, **(settings | changes))
    assert Trainer(config).fit() == 0
    torch.set_flush_denormal(False)
    return Path(config.run_dir)
