"""Training length from FLOPs: the paper's token counts, whole steps, and budgets that buy nothing."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from engram.config import Config, ConfigError, load_config
from engram.model.accounting import count_flops, count_parameters
from engram.sweep.budget import steps_for

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(CONFIGS / "tiny_moe.yaml")


@pytest.mark.parametrize(("name", "flops", "tokens"), [("5_7b", 2e20, 58.7e9), ("9_9b", 6e20, 100.7e9)])
def test_the_papers_token_counts(name: str, flops: float, tokens: float) -> None:
    """6 x activated x tokens; our 9.9B base has 990 M activated parameters instead of 993 M."""
    config = load_config(CONFIGS / "paper" / f"allocation_{name}.yaml", ["model.memory=null"])
    assert steps_for(config, flops) * config.tokens_per_step == pytest.approx(tokens, rel=0.005)


def test_what_a_token_costs(config: Config) -> None:
    model, flops = config.model, 1e15
    costs = {"6nd": 6 * count_parameters(model).activated, "counted": count_flops(model, 256).training}
    # The head and attention scores make a small model's tokens dearer than its parameters say.
    assert costs["counted"] > 1.3 * costs["6nd"]
    short, counted = steps_for(config, flops), steps_for(config, flops, "counted")
    for steps, cost in ((short, costs["6nd"]), (counted, costs["counted"])):
        assert abs(steps * config.tokens_per_step * cost - flops) <= config.tokens_per_step * cost / 2
    # As many tokens in longer sequences have dearer attention.
    data = config.data.replace(sequence_length=512)
    longer = config.replace(data=data, train=config.train.replace(batch_size=config.train.batch_size // 2))
    assert longer.tokens_per_step == config.tokens_per_step
    assert steps_for(longer, flops, "counted") < counted and steps_for(longer, flops) == short


def test_steps_are_the_nearest_whole_number(config: Config) -> None:
    step = 16 * 256 * 6 * count_parameters(config.model).activated
    assert [steps_for(config, share * step) for share in (1, 1.4, 1.6, 99.6, 400)] == [1, 1, 2, 100, 400]
    step = 16 * 256 * count_flops(config.model, 256).training
    assert [steps_for(config, share * step, "counted") for share in (1.4, 1.6, 400)] == [1, 2, 400]


def test_a_budget_below_one_step_is_refused(config: Config) -> None:
    step = 16 * 256 * 6 * count_parameters(config.model).activated
    with pytest.raises(
        ConfigError, match=r"train 4,055 tokens, but one step takes 4,096 .*16 x .*256\).* is 5\.48e\+10"
    ):
        steps_for(config, 0.99 * step)


@pytest.mark.parametrize("flops", [0, -1e15, math.inf, math.nan])
def test_budgets_are_positive_and_finite(config: Config, flops: float) -> None:
    with pytest.raises(ConfigError, match=rf"a budget of {re.escape(f'{flops:g}')} FLOPs .*positive and finite"):
        steps_for(config, flops)


def test_unknown_counting_is_refused(config: Config) -> None:
    counting: Any = "6ND"
    with pytest.raises(ConfigError, match="counting is '6ND', but must be one of 6nd, counted"):
        steps_for(config, 1e15, counting)
