"""A prepared folder and finished runs of tiny models, made once for this folder's tests."""

from pathlib import Path

import pytest
import torch
import yaml

from engram.config import Config, load_config

TEXT = "the people of union states congress shall have power to lay and collect taxes for common defence"
WORDS = TEXT.split()


def write_corpus(path: Path, documents: int = 120) -> None:
    """Short documents of repeating phrases, so that a tiny model learns something."""
    path.mkdir(parents=True)
    for index in range(documents):
        sentences = [
            " ".join(WORDS[(index * 7 + line * 3 + word) % len(WORDS)] for word in range(5 + (index + line) % 7))
            for line in range(6)
        ]
        (path / f"{index:03d}.txt").write_text(". ".join(sentences) + f" – No. {index} café.\n", encoding="utf-8")


def tiny_config(folder: Path, name: str, **changes: str) -> Config:
    """A model with experts, memory and two residual streams that trains for a few steps."""
    model = {
        "num_layers": 2,
        "hidden_size": 16,
        "vocab_size": 300,
        "attention": {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6},
        "moe": {"num_experts": 4, "top_k": 2, "expert_dim": 8, "num_dense_layers": 1},
        "hyper_connection": {"hc_mult": 2},
        "memory": {"layer_ids": [0, 1], "num_heads": 2, "head_dim": 4, "rows_per_head": 97},
    }
    tree = {
        "model": model,
        "data": {
            "path": str(folder / "data"),
            "sequence_length": 32,
            "sources": [{"path": str(folder / "corpus")}],
            "validation_fraction": 0.15,
            "shard_tokens": 1024,
        },
        "optim": {"lr": 0.01},
        "train": {
            "steps": 12,
            "batch_size": 4,
            "dtype": "float32",
            "threads": 1,
            "log_every": 2,
            "eval_every": 6,
            "checkpoint_every": 6,
            "statistics_every": 4,
            "wandb": {"mode": "disabled"},
        },
        "eval": {
            "tokens": 320,
            "batch_size": 3,
            "prompt": "the people",
            "sample_tokens": 9,
            "gate_text": "the café & <b>",
        },
        "run_dir": str(folder / "runs" / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path, [f"{key}={value}" for key, value in changes.items()])


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def prepared_folder(workplace: Path) -> Path:
    from engram.data.prepare import prepare

    return prepare(tiny_config(workplace, "prepare"))


def _train(config: Config) -> Path:
    from engram.training.trainer import Trainer

    assert Trainer(config).fit() == 0
    # A setting of the process, which other tests do not expect.
    torch.set_flush_denormal(False)
    return Path(config.run_dir)


@pytest.fixture(scope="session")
def run_folder(workplace: Path, prepared_folder: Path) -> Path:
    """A finished run with memory."""
    return _train(tiny_config(workplace, "engram"))


@pytest.fixture(scope="session")
def baseline_folder(workplace: Path, prepared_folder: Path) -> Path:
    """A finished run without memory, from another learning rate."""
    return _train(tiny_config(workplace, "moe", **{"model.memory": "null", "optim.lr": "0.02"}))
