"""A tiny model on a tiny corpus: a whole run takes about a second on one thread."""

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engram.config import Config, parse_config
from engram.config_file import merge
from engram.data.prepare import prepare
from engram.training.trainer import Trainer

VOCABULARY = 384


def config_tree(data: Path, corpus: Path, run_dir: Path) -> dict[str, Any]:
    """Two layers with every part: experts, hyper-connections, memory with convolution; odd sizes where they can be."""
    return {
        "run_dir": str(run_dir),
        "seed": 5,
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "vocab_size": VOCABULARY,
            "attention": {
                "num_heads": 2,
                "kv_lora_rank": 12,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "v_head_dim": 8,
            },
            "moe": {"num_experts": 5, "top_k": 2, "expert_dim": 16},
            "hyper_connection": {"hc_mult": 2},
            "memory": {"layer_ids": [1], "num_heads": 3, "head_dim": 8, "rows_per_head": 61, "init_std": 0.1},
        },
        "data": {
            "path": str(data),
            "cache": str(data.parent / "packages"),
            "sequence_length": 32,
            "sources": [{"path": str(corpus)}],
            "validation_fraction": 0.1,
        },
        "train": {
            "steps": 9,
            "batch_size": 4,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "log_every": 1,
            "eval_every": 4,
            "checkpoint_every": 3,
            "wandb": {"mode": "disabled"},
        },
        "optim": {"lr": 3e-3, "schedule": {"warmup_steps": 2}},
        "eval": {"tokens": 256, "batch_size": 4},
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up words with a skewed distribution, in documents of uneven length."""
    generator = random.Random(11)
    syllables = ["ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "vé", "zu"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(150):
            text = " ".join(generator.choices(words, weights, k=generator.randint(5, 90))) + "."
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of the corpus."""
    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    prepare(parse_config(config_tree(folder, corpus, Path("runs/none"))))
    return folder


@pytest.fixture
def make_config(data: Path, corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """make_config("name", train={"steps": 3}, ...): the tiny config with sections replaced key by key."""

    def make(run: str = "run", **changes: Any) -> Config:
        return parse_config(merge(config_tree(data, corpus, tmp_path / run), changes))

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs set the number of threads of their process, which here is everybody's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def train_in_child(config: Config) -> multiprocessing.Process:
    """Start a run in a forked process, which a test may kill."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config,))
    process.start()
    return process  # type: ignore[return-value]


def _train(config: Config) -> None:
    raise SystemExit(int(Trainer(config).fit()))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, model and optimizer."""
    from safetensors.torch import load_file

    return {
        f"{name}/{key}": tensor
        for name in ("model", "optim")
        for key, tensor in load_file(checkpoint / f"{name}.safetensors").items()
    }


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Equal to the bit: every tensor, and the state but for places and times."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []
    assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())


def metrics_of(run_dir: str | Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
