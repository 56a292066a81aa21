"""Ratios and memories that cannot be reached: what is said of them, and that it is true of models at large."""

import math
import re
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from engram.config import ConfigError, ModelConfig
from engram.model.accounting import count_parameters
from engram.sweep.allocation import achieved, allocate, feasible_range
from tests.sweep.models import axes, small


@pytest.mark.parametrize("share", [math.nan, math.inf, -0.01, 1.01, 0.9999, 0.99])
@pytest.mark.parametrize("compensate", [True, False])
def test_ratios_out_of_reach_name_the_range(share: float, compensate: bool) -> None:
    assert feasible_range(small(), compensate) == (0, 27 / 28)
    with pytest.raises(ConfigError, match=rf"rho (is )?{share}[: ].*feasible are ratios from 0 to 0\.9643, and 1 \(no"):
        allocate(small(), share, compensate)


def test_both_ends_of_the_range_are_feasible_and_the_next_is_not() -> None:
    # 96 tables of 32: two rows in each are more than the first expert leaves.
    base = small(hidden_size=16, memory__num_heads=16, memory__head_dim=2, memory__max_ngram_size=7, ffn_dim=2048)
    low, high = feasible_range(base)
    assert 0 <= low < high < 1
    most = round(high * 28) + 4
    assert most < 31
    for share in (low, high):
        allocate(base, share)
    with pytest.raises(ConfigError, match=rf"means {most + 1} of 32 experts.* from {low:.4g} to {high:.4g}"):
        allocate(base, (most + 1 - 4) / 28)


def test_one_module_of_half_width_fits_and_two_of_full_width_do_not() -> None:
    allocate(small(memory__head_dim=64 // 8), 0.75)
    wide = small(memory__head_dim=128 // 8, memory__layer_ids=[1, 2])
    with pytest.raises(
        ConfigError, match=r"d_mem 128 at layers \[1, 2\] .* d_mem that fits is 112 \(memory.head_dim 14"
    ):
        allocate(wide, 0.75)
    allocate(small(memory__head_dim=14, memory__layer_ids=[1, 2]), 0.75)
    with pytest.raises(ConfigError, match="d_mem that fits is 112"):
        allocate(small(memory__head_dim=15, memory__layer_ids=[1, 2]), 0.75)
    # The paper's accounting lets it stand, and says what it costs.
    report = achieved(allocate(wide, 0.75, compensate=False), wide)
    assert report.added_by_memory == 2 * (5 * 128 * 128 + 8 * 128 + 4 * 128 * 5 + 128)
    assert report.activated_deviation > 0.15 > 0.01 > abs(report.paper_activated_deviation)


def test_where_no_memory_can_be_paid_for() -> None:
    bare = small(moe__num_shared_experts=0, moe__num_dense_layers=0)
    with pytest.raises(ConfigError, match="pay for 0 only"):
        allocate(bare, 0.75)
    assert feasible_range(bare) == (1, 1)
    with pytest.raises(ConfigError, match="rho is 2: of this model, only rho = 1"):
        allocate(bare, 2)
    assert feasible_range(bare, compensate=False) == (0, 27 / 28)
    streams = small(moe__num_shared_experts=0, moe__num_dense_layers=0, memory__layer_ids=[0, 1, 2, 3])
    with pytest.raises(ConfigError, match="no d_mem fits"):
        allocate(streams, 0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": None}, r"model\.moe is null, but an allocation needs both axes"),
        ({"memory": None}, r"model\.memory is null, but an allocation needs both axes"),
        ({"moe__num_experts": 4}, "uses all 4 experts"),
        ({"moe__num_dense_layers": 4}, "num_dense_layers is 4 of 4 layers"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 1])
def test_models_without_both_axes_are_refused(changes: dict[str, Any], message: str, share: float) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(small(**changes), share)


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def bases(draw: st.DrawFn) -> ModelConfig:
    layers, eights = draw(st.integers(1, 4)), st.integers(1, 16).map(lambda n: 8 * n)
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    return small(
        num_layers=layers,
        hidden_size=draw(eights),
        ffn_dim=draw(st.none() | eights),
        hyper_connection=draw(st.none() | st.fixed_dictionaries({"hc_mult": st.sampled_from([1, 4])})),
        moe={
            "num_experts": groups * draw(st.integers(8 // groups, 40 // groups)),
            "num_groups": groups,
            "top_k_groups": draw(st.integers(1, groups)),
            "top_k": draw(st.integers(1, 2)),
            "expert_dim": draw(eights),
            "num_shared_experts": draw(st.integers(0, 2)),
            "num_dense_layers": draw(st.integers(0, layers - 1)),
        },
        memory={
            "layer_ids": draw(st.sets(st.integers(0, layers - 1), min_size=1, max_size=2).map(sorted)),
            "num_heads": draw(st.integers(1, 4)),
            "head_dim": draw(st.integers(1, 8)),
            "rows_per_head": 2,
            "max_ngram_size": draw(st.integers(2, 4)),
            "conv": draw(st.booleans()),
            "fusion": draw(st.sampled_from(["per_stream", "single"])),
        },
    )


@settings(max_examples=150)
@given(bases(), st.floats(0, 1), st.booleans())
def test_an_allocation_fits_or_says_why_not(base: ModelConfig, share: float, compensate: bool) -> None:
    target = count_parameters(base.replace(memory=None))
    try:
        result = allocate(base, share, compensate)
    except ConfigError as error:
        reasons = ("feasible are ratios from", "only rho = 1", "d_mem")
        assert any(reason in str(error) for reason in reasons), error
        event("refused")
        return
    assume(result.memory is not None)
    event("allocated")
    counts = count_parameters(result)
    moe, memory = axes(result)
    before, _ = axes(base)
    assert moe.num_experts % moe.num_groups == 0
    assert abs(moe.num_experts - moe.top_k - share * (before.num_experts - moe.top_k)) <= max(
        0.5, moe.num_groups / 2 + 0.5
    )
    assert min(memory.rows_per_head) >= 2
    if compensate:
        assert abs(counts.total - target.total) <= 0.005 * target.total
        assert abs(counts.activated - target.activated) <= 0.01 * target.activated
        assert 2 * moe.shared_width >= before.shared_width and 2 * result.dense_width >= base.dense_width
        assert result.dense_width % 8 == moe.shared_width % 8 == 0
    else:
        assert abs(counts.sparse - target.sparse) <= 0.005 * target.total
        assert (result.dense_width, moe.shared_width) == (base.dense_width, before.shared_width)


@settings(max_examples=15)
@given(bases())
def test_the_range_that_messages_name_is_true(base: ModelConfig) -> None:
    moe, _ = axes(base)
    low, high = feasible_range(base)
    if low < 1:
        allocate(base, low)
        allocate(base, high)
    for count in range(moe.top_k, moe.num_experts):
        share = (count - moe.top_k) / (moe.num_experts - moe.top_k)
        near = (moe.num_groups / 2) / (moe.num_experts - moe.top_k)
        if not low - near <= share <= high + near:
            with pytest.raises(ConfigError):
                allocate(base, share)


@settings(max_examples=60)
@given(bases(), st.floats(0, 0.8), st.integers(2, 6))
def test_the_memory_that_messages_name_fits_and_the_next_does_not(base: ModelConfig, share: float, times: int) -> None:
    _, memory = axes(base)
    try:
        allocate(base.replace(memory=memory.replace(head_dim=8 * times * memory.head_dim)), share)
    except ConfigError as error:
        named = re.search(r"largest d_mem that fits is (\d+) \(memory\.head_dim (\d+)\)", str(error))
        assume(named is not None)
        assert named
        d_mem, head_dim = map(int, named.groups())
    else:
        assume(False)
    event("named")
    fitting = memory.replace(head_dim=head_dim)
    assert fitting.d_mem == d_mem
    try:
        allocate(base.replace(memory=fitting), share)
    except ConfigError as error:
        # Wide rows leave few of them, which is another limit.
        assert "each head's table" in str(error) or "rows of whole tables" in str(error)
    with pytest.raises(ConfigError):
        allocate(base.replace(memory=memory.replace(head_dim=head_dim + 1)), share)
