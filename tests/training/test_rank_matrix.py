"""Every allowed combination of what ranks divide, against one process: the same losses but for the order of sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engram.config import Config
from engram.training.metrics import read_metrics
from engram.training.ranked import train_in_world
from engram.training.trainer import Trainer
from tests.distributed.ranks import run_ranks, values

MakeConfig = Callable[..., Config]

STAGES = (0, 1, 2, 3)
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # distributed, train.tables
    "on each rank": ({}, None),
    "divided": ({"table_ranks": "all"}, None),
    "on the first of two ranks": ({"table_ranks": 1}, None),
    "divided, in host memory": ({"table_ranks": "all"}, {"tier": "host", "cache_rows": 1536}),
    "divided, in files": ({"table_ranks": 1}, {"tier": "file", "cache_rows": 1536}),
}
EXPERTS = (1, 2)
# Every pair of a stage and a kind of tables; every pair of either with a division of experts.
PAIRS = [(stage, tables, EXPERTS[(stage + place) % 2]) for stage in STAGES for place, tables in enumerate(TABLES)]
# Losses of one process and of ranks may differ by so much, in the first steps and at the end: a difference of one
# rounding grows.
EARLY, LATE = 1e-5, 2e-2


def config_of(make_config: MakeConfig, name: str, steps: int, **changes: Any) -> Config:
    distributed, tables = changes.pop("distributed", None), changes.pop("tables", None)
    return make_config(
        name,
        # Without a token near a tie between experts in the first steps.
        seed=6,
        model={"moe": {"num_experts": 6}, "memory": {"rows_per_head": 611}},
        optim={"clip_norm": 0.5, "eps": 1e-3, "table": {"eps": 1e-3}, "muon": {"newton_schulz_dtype": "float32"}},
        train={"batch_size": 8, "steps": steps, "checkpoint_every": steps, "eval_every": steps, "tables": tables},
        eval={"batch_size": 8},
        distributed=distributed,
    )


def losses(config: Config) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")])


def compare(make_config: MakeConfig, folder: Path, ranks: int, steps: int, combination: tuple[int, str, int]) -> None:
    stage, tables, expert_ranks = combination
    alone = config_of(make_config, "alone", steps)
    assert Trainer(alone).fit() == 0
    dividing, stored = TABLES[tables]
    distributed = {"zero_stage": stage, "expert_ranks": expert_ranks, **dividing}
    config = config_of(make_config, "ranks", steps, distributed=distributed, tables=stored)
    results = folder / "results"
    results.mkdir()
    assert values(run_ranks(ranks, train_in_world, config, folder=results)) == ranks * [0]
    ours, theirs = losses(config), losses(alone)
    assert len(ours) == len(theirs) == steps
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=0, atol=EARLY)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LATE)


@pytest.mark.parametrize("combination", PAIRS, ids=str)
def test_pairs_of_settings(make_config: MakeConfig, tmp_path: Path, combination: tuple[int, str, int]) -> None:
    compare(make_config, tmp_path, 2, 6, combination)
