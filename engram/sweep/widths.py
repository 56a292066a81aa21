"""Narrower shared experts and dense layers, which pay for what memory adds to the activated parameters."""

import math
from bisect import bisect_left

from engram.config import ConfigError, ModelConfig
from engram.model.accounting import count_parameters

# What whole widths may leave of a difference from the activated parameters of the model without memory.
ACTIVATED_TOLERANCE = 0.01
# Widths stay multiples of this, as matrix products like them.
_GRAIN = 8


class Unreachable(Exception):
    """No whole numbers give this share of experts; the message says which limit stands in the way."""


def narrowed(model: ModelConfig, target: int) -> ModelConfig:
    """`model` with the shared and dense widths that bring its activated parameters nearest to `target`.

    Of equally near pairs, the one whose two cuts are nearest to the same share of their widths. Absent layers keep
    their settings. Raises ConfigError where cuts to half are not enough, naming the largest d_mem for which they are;
    Unreachable where the widths' steps are too coarse.
    """
    moe = model.moe
    assert moe is not None
    counts = count_parameters(model)
    surplus = counts.activated - target
    held = {part.name: part.parameters for part in counts.parts}
    shared, dense = moe.shared_width, model.dense_width
    # Parameters of one unit of width; 0 where there are no such layers.
    shared_cost = held.get("shared experts", 0) // max(shared, 1)
    dense_cost = held.get("dense feed-forward", 0) // dense
    shared_choices, dense_choices = _choices(shared, shared_cost), _choices(dense, dense_cost)
    best: tuple[int, float, int, int] | None = None
    for narrow in shared_choices:
        left = surplus - shared_cost * (shared - narrow)
        near = bisect_left(dense_choices, dense - left / dense_cost) if dense_cost else 0
        for thin in dense_choices[max(near - 1, 0) : near + 1]:
            unevenness = abs(narrow / max(shared, 1) - thin / dense) if shared_cost and dense_cost else 0.0
            found = (abs(left - dense_cost * (dense - thin)), unevenness, narrow, thin)
            best = min(best or found, found)
    assert best is not None
    missed, _, narrow, thin = best
    payable = shared_cost * (shared - shared_choices[0]) + dense_cost * (dense - dense_choices[0])
    slack = ACTIVATED_TOLERANCE * target
    if surplus - payable > slack:
        raise ConfigError(_too_wide(model, target, surplus, payable, slack))
    if missed > slack:
        raise Unreachable(
            f"and widths in steps of {_GRAIN}, half as large again at most, leave the activated parameters {missed:,} "
            f"away from {target:,}"
        )
    return model.replace(
        ffn_dim=thin if dense_cost else model.ffn_dim,
        moe=moe.replace(shared_dim=narrow if shared_cost else moe.shared_dim),
    )


def _choices(width: int, cost: int) -> list[int]:
    """Half of `width` to one and a half of it, ascending; only `width` itself where it costs nothing.

    Wider where the router saves more than memory adds.
    """
    first = _GRAIN * math.ceil(width / 2 / _GRAIN)
    return sorted({width, *range(first, 3 * width // 2 + 1, _GRAIN)}) if cost else [width]


def _too_wide(model: ModelConfig, target: int, surplus: int, payable: int, slack: float) -> str:
    memory = model.memory
    assert memory is not None
    heads = memory.d_mem // memory.head_dim

    def with_head_dim(width: int) -> ModelConfig:
        return model.replace(memory=memory.replace(head_dim=width))

    def fits(width: int) -> bool:
        try:
            narrowed(with_head_dim(width), target)
        except Unreachable:
            return False
        return True

    slope = count_parameters(with_head_dim(memory.head_dim + 1)).activated - count_parameters(model).activated
    bound = memory.head_dim - math.ceil((surplus - payable - slack) / slope)
    most = next(filter(fits, range(bound, 0, -1)), None)
    advice = f"the largest d_mem that fits is {heads * most} (memory.head_dim {most})" if most else "no d_mem fits"
    return (
        f"memory of d_mem {memory.d_mem} at layers {list(memory.layer_ids)} adds {surplus:,} activated parameters, but "
        f"shared experts and dense layers cut to half their widths pay for {payable:,} only: {advice}; or name fewer "
        "memory.layer_ids, or set compensate to false (the paper's accounting)"
    )
