"""Bytes that a rank holds: by hand, against one process, and against what DeepSpeed really allocates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.config import Config, UserError, parse_config
from engram.distributed.accounting import Held, activation_bytes, held_by
from engram.distributed.plan import make_plan
from engram.distributed.world import World
from engram.model.accounting import count_bytes
from tests.distributed.backbones import RankProcess, tiny_config
from tests.distributed.plans import tiny
from tests.distributed.ranks import run_ranks, values


def by_name(held: list[Held]) -> dict[str, Held]:
    return {each.name: each for each in held}


@pytest.mark.parametrize("muon", [{}, None])
@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam"])
def test_one_process_holds_what_it_did_without_a_plan(kind: str, muon: dict[str, Any] | None) -> None:
    over_encoding = {"num_heads": 1, "head_dim": 4, "rows_per_head": 23}
    config = tiny(
        distributed=None,
        optim={"muon": muon, "table": {"kind": kind}},
        model={"over_encoding": over_encoding, "memory": {"table_dtype": "bfloat16"}},
        train={"batch_size": 2},
    )
    held = held_by(make_plan(config, 1), 0)
    counts = count_bytes(config.model, config.optim, config.tokens_per_step).roles
    backbone = [each for each in held if each.name.startswith(("hidden", "routed", "vocabulary"))]
    tables = [each for each in held if each.name.startswith("table")]
    for parts, roles in ((backbone, ("muon", "adamw")), (tables, ("table",))):
        for name in ("parameters", "gradients", "state"):
            assert sum(getattr(each, name) for each in parts) == sum(getattr(counts[role], name) for role in roles)
    assert len(backbone) == 3 and len(tables) == 3 and len(held) == 7


# Matrices of 3 layers of width 16: attention with 2 heads of 10 + 6, rank 5; a dense layer of width 15; two sparse ones
# with 6 experts of 3 x 16 x 5 and one shared; two projections of 3 x 16 from 18.
MATRICES = 3 * (16 * 2 * 10 + 16 * (5 + 4) + 5 * 2 * (6 + 6) + 2 * 6 * 16) + 3 * 16 * 15 + 2 * 240 + 2 * 3 * 16 * 18
EXPERTS = 2 * 6 * 240


@pytest.mark.parametrize(
    ("stage", "offload", "weights", "gradients", "state", "host"),
    [
        # In multiples of a float32 whole (W) and of a third (S): Muon has one moment.
        (0, False, "W", "W", "W", "0"),
        (1, False, "W", "W", "S + S", "0"),
        (2, False, "W", "S", "S + S", "0"),
        (3, False, "S", "S", "S + S", "0"),
        (1, True, "W", "W", "0", "4 * S"),
        (2, True, "W", "0", "0", "4 * S"),
        (3, True, "S", "0", "0", "3 * S"),
    ],
)
def test_stages_divide_what_their_names_say(
    stage: int, offload: bool, weights: str, gradients: str, state: str, host: str
) -> None:
    config = tiny(distributed={"zero_stage": stage, "offload_optimizer": offload}, train={"batch_size": 6})
    held = [by_name(held_by(make_plan(config, 3), rank)) for rank in range(3)]
    for name, elements in (("hidden matrices", MATRICES), ("routed experts", EXPERTS)):
        assert elements % 3 == 0
        sizes = {"W": 4 * elements, "S": 4 * elements // 3}
        expected = [eval(text, sizes) for text in (weights, gradients, state, host)]
        for rank in range(3):
            each = held[rank][name]
            assert [each.parameters, each.gradients, each.state, each.host] == expected, (name, rank)


def test_divided_experts_are_shared_by_those_that_hold_the_same() -> None:
    config = tiny(distributed={"zero_stage": 1, "expert_ranks": 2}, train={"batch_size": 8})
    for rank in range(4):
        experts = by_name(held_by(make_plan(config, 4), rank))["routed experts"]
        assert experts.parameters == experts.gradients == 4 * EXPERTS // 2
        # Two ranks hold the same half: momentum and a copy of the weights for a quarter.
        assert experts.state == 2 * 4 * EXPERTS // 4


def test_tables_lie_where_the_settings_say() -> None:
    """Width 3, row Adam: 12 bytes, 28 of state; a gradient's row has 12 and its number."""
    train = {"batch_size": 2, "micro_batch_size": None}
    tables = make_plan(tiny(), 1).tables
    rows = tables[0].num_rows
    on_device = by_name(held_by(make_plan(tiny(train=train), 1), 0))["table of block 1"]
    # 18 tokens, 6 heads.
    assert on_device == Held("table of block 1", 12 * rows, 108 * 20, 28 * rows)
    divided = tiny(train=train, distributed={"table_ranks": "all"})
    plan = make_plan(divided, 2)
    held = [by_name(held_by(plan, rank)) for rank in range(2)]
    own = [len(table.ranges[0]) for table in plan.tables]
    assert held[0]["table of block 1"].parameters == 12 * own[0] and own[0] == -(-rows // 2)
    assert sum(each["table of block 2"].state for each in held) == 28 * tables[1].num_rows
    # Nine tokens of a rank: rows, ids and gradient sums of 2 x 54, and gradients as a message. What comes from both
    # ranks for its own rows: ids, gradients as a message and by table.
    from_all = 2 * sum(table.rows_at_most(table.ranges[0], 9) for table in plan.tables)
    exchanged = 108 * (12 + 8 + 12 + 12) + from_all * (8 + 12 + 12)
    assert held[0]["rows of a step, at most"].passing == exchanged
    moving = sum(40 * plan.rows_at_most(table, 0) for table in plan.tables)
    for tier in ("host", "file"):
        storage = {"tier": tier, "cache_rows": 200}
        config = tiny(train={**train, "tables": storage}, distributed={"table_ranks": "all"})
        cached = by_name(held_by(make_plan(config, 2), 0))
        # Rows of the next step wait for it on the device; they came through host memory, through which others go.
        assert cached["rows of a step, at most"].passing == exchanged + moving
        assert cached["rows of a step, at most"].host == 2 * moving
        gradients = plan.rows_at_most(plan.tables[0], 0) * 20
        whole = {tier: 40 * own[0]}
        slots = min(200, own[0])
        assert cached["table of block 1"] == Held("table of block 1", slots * 12, gradients, slots * 28, **whole)
    alone = tiny(train={**train, "tables": {"tier": "host", "cache_rows": 200}}, distributed=None)
    plan = make_plan(alone, 1)
    moving = sum(40 * plan.rows_at_most(table, 0) for table in plan.tables)
    assert by_name(held_by(plan, 0))["rows of a step, at most"].passing == 216 * (12 + 8 + 12) + moving


def test_copies_for_checkpoints_are_what_a_rank_writes() -> None:
    config = tiny(distributed={"table_ranks": 2}, train={"batch_size": 6, "async_checkpoints": True})
    plan = make_plan(config, 3)
    copies = [by_name(held_by(plan, rank))["copies for checkpoints"].host for rank in range(3)]
    backbone = sum(4 * (1 + group.moments) * group.elements for group in plan.groups)
    rows = sum(40 * table.num_rows for table in plan.tables)
    assert sum(copies) == pytest.approx(backbone + rows, abs=3)
    assert copies[2] == round(backbone / 3) < copies[1] <= copies[0]


@settings(max_examples=60)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    stage=st.integers(0, 3),
    data=st.data(),
)
def test_no_rank_holds_more_than_the_first(ranks: int, stage: int, data: st.DataObject) -> None:
    distributed = {
        "zero_stage": stage,
        "offload_optimizer": stage > 0 and data.draw(st.booleans()),
        "table_ranks": data.draw(st.one_of(st.none(), st.just("all"), st.integers(1, ranks))),
        "expert_ranks": data.draw(st.sampled_from([size for size in (1, 2, 3) if ranks % size == 0])),
    }
    kind = data.draw(st.sampled_from(["row_adam", "dense_adam"]))
    config = tiny(distributed=distributed, optim={"table": {"kind": kind}}, train={"batch_size": 24})
    plan = make_plan(config, ranks)
    held = [held_by(plan, rank) for rank in range(ranks)]
    # Heads that a border cuts may let another rank have a few more gradient rows, and be asked for more.
    if kind == "dense_adam" or distributed["table_ranks"] is None:
        for kept in (lambda each: each.device - each.passing, lambda each: each.host):
            totals = [sum(kept(each) for each in rank) for rank in held]
            assert max(totals) == totals[0]
    if stage == 3 and not distributed["offload_optimizer"]:
        for group in plan.groups:
            assert sum(by_name(rank)[group.name].parameters for rank in held) == 4 * group.elements


# --------------------------------------------------------------------------------------------------------- activations


def test_checkpointed_blocks_keep_their_streams_and_one_inside() -> None:
    """A dense block of width 8 without extras, in bfloat16: 2 heads of 10 + 6, rank 5, feed-forward 12."""
    model = {"num_layers": 4, "hidden_size": 8, "moe": None, "memory": None, "hyper_connection": None, "ffn_dim": 12}
    inside = 2 * 2 * (10 + 6) + 5 + 3 * 12 + 4 * 8
    for checkpointing, expected in ((False, 4 * inside), (True, inside)):
        config = tiny(model=model, train={"activation_checkpointing": checkpointing})
        assert activation_bytes(make_plan(config, 3)) == 2 * 9 * (4 * 8 + expected) * 2
    whole_batch = tiny(model=model, train={"micro_batch_size": None, "dtype": "float32"})
    assert activation_bytes(make_plan(whole_batch, 3)) == 8 * 9 * (4 * 8 + 4 * inside) * 4


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


def divided(stage: int) -> Config:
    tree: dict[str, Any] = tiny_config(stage).model_dump(mode="json")
    tree["model"]["moe"]["num_experts"] = 4
    tree["distributed"]["expert_ranks"] = 2
    return parse_config(tree)


def measure(world: World) -> list[tuple[int, int]]:
    """Bytes of weights and optimizer state, and of gradients before the step, in each stage."""
    found = []
    for stage in range(4):
        process = RankProcess(world, divided(stage))
        process.gradient(0)
        backbone = process.backbone
        tables = {each.parameter for each in process.tables}
        parameters: list[Any] = [each for each in process.model.parameters() if each not in tables]
        tensors = [parameter.ds_tensor if stage == 3 else parameter for parameter in parameters]
        for share in backbone.shares:
            tensors += [share.weights, *share.states().values()]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        gradients = sum(part.nbytes for share in backbone.shares for part in backbone._gradient_parts(share))
        found.append((sum(storages.values()), gradients))
        backbone.close()
    return found


def test_deepspeed_holds_what_the_plan_says(tmp_path: Path) -> None:
    for rank, stages in enumerate(values(run_ranks(2, measure, folder=tmp_path))):
        for stage, (kept, gradients) in enumerate(stages):
            held = [each for each in held_by(make_plan(divided(stage), 2), rank) if not each.passing]
            own = [each for each in held if not each.name.startswith("table")]
            expected = sum(each.parameters + each.state for each in own)
            assert kept == pytest.approx(expected, rel=0.02), (rank, stage)
            # Stage 1 has all of them, of which only a share counts in the end.
            if stage != 1:
                assert gradients == pytest.approx(sum(each.gradients for each in own), rel=0.02), (rank, stage)


def test_a_plan_is_refused_before_it_is_counted() -> None:
    with pytest.raises(UserError):
        held_by(make_plan(tiny(distributed=None), 2), 0)


def test_torch_agrees_on_the_bytes_of_entries() -> None:
    from engram.distributed.layout import ENTRY

    assert {name: getattr(torch, name).itemsize for name in ENTRY} == ENTRY
