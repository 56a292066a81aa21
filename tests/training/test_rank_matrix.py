"""Every allowed combination of what ranks divide, against one process: the same losses but for the order of sums."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engram.config import Config, parse_config
from engram.config_file import merge
from engram.training.metrics import read_metrics
from engram.training.ranked import train_in_world
from engram.training.trainer import Trainer
from tests.distributed.ranks import run_ranks, values
from tests.training.conftest import config_tree

MakeConfig = Callable[..., Config]

STAGES = (0, 1, 2, 3)
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # distributed, train.tables
    "on each rank": ({}, None),
    "divided": ({"table_ranks": "all"}, None),
    "on one rank": ({"table_ranks": 1}, None),
    "divided, in host memory": ({"table_ranks": "all"}, {"tier": "host", "cache_rows": 1536}),
    "on one rank, in files": ({"table_ranks": 1}, {"tier": "file", "cache_rows": 1536}),
}
EXPERTS = (1, 2)
# Losses of one process and of ranks may differ by so much, in the first ten steps and in fifty: a difference of one
# rounding grows, and one process that takes its batch in two halves drifts as far.
EARLY, LATE = 1e-5, 5e-3


class Course(NamedTuple):
    """What a run divides, and among how many."""

    ranks: int
    stage: int
    tables: str
    expert_ranks: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, stage {self.stage}, tables {self.tables}, experts over {self.expert_ranks}"


# Every pair of a stage and a kind of tables, and every pair of either with a division of experts.
PAIRS = [
    Course(2, stage, tables, EXPERTS[(stage + place) % 2]) for stage in STAGES for place, tables in enumerate(TABLES)
]
EVERY = [Course(ranks, *each) for ranks in (2, 4) for each in product(STAGES, TABLES, EXPERTS)]


def settings_of(steps: int, tables: dict[str, Any] | None = None, **distributed: Any) -> dict[str, Any]:
    return {
        # Without a token near a tie between experts in the first ten steps.
        "seed": 6,
        "model": {"moe": {"num_experts": 6}, "memory": {"rows_per_head": 611}},
        # Steps must not hang on the signs of gradients that are zero but for rounding.
        "optim": {
            "lr": 1e-3,
            "clip_norm": 0.5,
            "eps": 1e-3,
            "table": {"eps": 1e-3},
            "muon": {"newton_schulz_dtype": "float32"},
        },
        "train": {
            "batch_size": 8,
            "steps": steps,
            "checkpoint_every": steps,
            "eval_every": steps,
            "log_every": 1,
            "tables": tables,
        },
        "eval": {"batch_size": 8},
        "distributed": distributed or None,
    }


def losses(config: Config) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")])


@pytest.fixture(scope="module")
def alone(data: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], torch.Tensor]:
    """alone(steps): the losses of one process."""

    @cache
    def train(steps: int) -> torch.Tensor:
        tree = config_tree(data, corpus, tmp_path_factory.mktemp("alone") / "run")
        config = parse_config(merge(tree, settings_of(steps)))
        assert Trainer(config).fit() == 0
        return losses(config)

    return train


def compare(make_config: MakeConfig, folder: Path, course: Course, theirs: torch.Tensor) -> None:
    dividing, stored = TABLES[course.tables]
    distributed = {"zero_stage": course.stage, "expert_ranks": course.expert_ranks, **dividing}
    config = make_config("ranks", **settings_of(len(theirs), stored, **distributed))
    results = folder / "results"
    results.mkdir()
    assert values(run_ranks(course.ranks, train_in_world, config, folder=results)) == course.ranks * [0]
    ours = losses(config)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=0, atol=EARLY)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LATE)


@pytest.mark.parametrize("course", PAIRS, ids=str)
def test_pairs_of_settings(
    make_config: MakeConfig, tmp_path: Path, alone: Callable[[int], torch.Tensor], course: Course
) -> None:
    compare(make_config, tmp_path, course, alone(6))


@pytest.mark.slow
@pytest.mark.parametrize("course", EVERY, ids=str)
def test_fifty_steps(
    make_config: MakeConfig, tmp_path: Path, alone: Callable[[int], torch.Tensor], course: Course
) -> None:
    compare(make_config, tmp_path, course, alone(50))
