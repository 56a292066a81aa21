"""Training length from a budget of FLOPs, so that models of different cost can be trained for the same compute."""

import math
from typing import Literal, get_args

from engram.config import Config, ConfigError, ModelConfig
from engram.model.accounting import count_flops, count_parameters

# `6nd`: the paper's 6 x activated parameters x tokens, without head and attention scores; `counted`: every product.
Counting = Literal["6nd", "counted"]


def steps_for(config: Config, flops: float, counting: Counting = "6nd") -> int:
    """Whole optimizer steps whose cost, forward and backward, is nearest to `flops`.

    Ratios of one allocation share the tokens of the model without memory: pass that one for all of them. Raises
    ConfigError: not even one step fits, `flops` is not a positive finite number, or `counting` is unknown.
    """
    tokens = _tokens(config.model, flops, config.data.sequence_length, counting)
    if tokens < config.tokens_per_step:
        raise ConfigError(
            f"{flops:.3g} FLOPs train {math.floor(tokens):,} tokens, but one step takes {config.tokens_per_step:,} "
            f"(train.batch_size {config.train.batch_size} x data.sequence_length {config.data.sequence_length}), which "
            f"is {flops * config.tokens_per_step / tokens:.3g} FLOPs: raise the budget or lower the batch"
        )
    return round(tokens / config.tokens_per_step)


def _tokens(model: ModelConfig, flops: float, sequence_length: int, counting: Counting) -> float:
    if counting not in get_args(Counting):
        raise ConfigError(f"counting is {counting!r}, but must be one of {', '.join(get_args(Counting))}")
    if not 0 < flops < math.inf:
        raise ConfigError(f"a budget of {flops:g} FLOPs cannot be trained: it must be positive and finite")
    if counting == "6nd":
        return flops / (6 * count_parameters(model).activated)
    return flops / count_flops(model, sequence_length).training
