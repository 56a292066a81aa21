"""Bytes that a rank sends: by hand, by enumeration and by simulation; and what hides behind computing."""

import itertools
import random
from typing import Any

import pytest

from engram.config import Config
from engram.distributed.layout import Table
from engram.distributed.machine import Machine
from engram.distributed.plan import Plan, make_plan
from engram.distributed.traffic import Sent, exchanged, flops_before, remote_ranks, sent_by, windows
from engram.model.accounting import count_flops
from tests.distributed.plans import tiny


def sent(plan: Plan) -> dict[str, Sent]:
    return {each.name: each for each in sent_by(plan)}


def test_one_rank_sends_nothing() -> None:
    assert sent_by(make_plan(tiny(distributed={"table_ranks": "all"}), 1)) == []


@pytest.mark.parametrize(
    ("stage", "checkpointing", "gradients", "parameters"),
    [
        # In multiples of the backbone's bytes less a rank's own fourth; 3 micro-batches.
        (0, False, 2, 0),
        (1, False, 2, 1),
        (2, False, 2 * 3, 1),
        (3, False, 3, 2 * 3),
        (3, True, 3, 3 * 3),
    ],
)
def test_zero_reduces_and_gathers(stage: int, checkpointing: bool, gradients: int, parameters: int) -> None:
    config = tiny(
        distributed={"zero_stage": stage}, train={"batch_size": 24, "activation_checkpointing": checkpointing}
    )
    plan = make_plan(config, 4)
    assert plan.micro_batches == 3
    around = 4 * sum(group.elements for group in plan.groups) * 3 / 4
    found = sent(plan)
    assert found["gradients"].at_most == pytest.approx(gradients * around)
    assert ("parameters" in found) == (stage > 0)
    if stage:
        assert found["parameters"].at_most == pytest.approx(parameters * around)
        matrices = sum(group.elements for group in plan.groups[:2])
        # Bfloat16, there and back.
        assert found["Muon's directions"].at_most == pytest.approx(2 * 2 * matrices / 4 * 3 / 4)


def test_divided_experts_sum_gradients_among_those_that_hold_the_same() -> None:
    plan = make_plan(tiny(distributed={"zero_stage": 0, "expert_ranks": 2}), 4)
    matrices, experts, others = (group.elements for group in plan.groups)
    # Half of the experts, on two ranks; all else on four.
    expected = 2 * 4 * ((matrices + others) * 3 / 4 + experts / 2 * 1 / 2)
    assert sent(plan)["gradients"].at_most == pytest.approx(expected)


@pytest.mark.parametrize(("experts", "ranks", "top_k"), [(6, 2, 2), (6, 3, 2), (8, 4, 3), (6, 6, 1)])
def test_tokens_visit_each_rank_of_their_experts_once(experts: int, ranks: int, top_k: int) -> None:
    moe = {"num_experts": experts, "top_k": top_k}
    batch = {"batch_size": ranks, "micro_batch_size": None}
    plan = make_plan(tiny(model={"moe": moe}, train=batch, distributed={"expert_ranks": ranks}), ranks)
    choices = list(itertools.combinations(range(experts), top_k))
    others = [len({expert // (experts // ranks) for expert in choice} - {0}) for choice in choices]
    assert remote_ranks(plan) == pytest.approx(sum(others) / len(choices))
    # Nine tokens in two layers: 16 bfloat16 to and fro, twice, with weights both ways and expert numbers once.
    each = 9 * 2 * (4 * 32 + 2 * 4 * top_k + 8 * top_k)
    tokens = sent(plan)["tokens to experts"]
    assert tokens.estimate == pytest.approx(each * remote_ranks(plan))
    assert tokens.at_most == each * max(others) >= tokens.estimate


# -------------------------------------------------------------------------------------------------------------- tables


def test_rows_held_by_all_travel_to_all() -> None:
    plan = make_plan(tiny(train={"batch_size": 3, "micro_batch_size": None}), 3)
    # Nine tokens, six heads, two tables, to two others; width 3 and a number.
    assert sent(plan)["gradients of rows"].at_most == 9 * 6 * 2 * 2 * (12 + 8)
    assert 0 < sent(plan)["gradients of rows"].estimate < sent(plan)["gradients of rows"].at_most


def test_dense_gradients_are_as_large_as_the_tables() -> None:
    plan = make_plan(tiny(optim={"table": {"kind": "dense_adam"}}), 3)
    entries = sum(table.num_rows * 3 for table in plan.tables)
    assert sent(plan)["gradients of tables"].at_most == pytest.approx(2 * 4 * entries * 2 / 3)


def simulate(plan: Plan) -> dict[str, float]:
    """Every rank reads random n-grams by Zipf's law, deduplicates, and sends to others: bytes, mean over ranks."""
    dice = random.Random(0)
    total = dict.fromkeys(("ids of rows", "rows", "gradients of rows"), 0.0)
    for table in plan.tables:
        read = _reads(plan, table, dice)
        owner = [rank for rank, rows in enumerate(table.ranges) for _ in rows]
        remote = sum(owner[row] != rank for rank, rows in enumerate(read) for row in rows)
        for name, size in zip(total, (8, table.row_bytes, 12), strict=True):
            total[name] += remote * size / plan.ranks
    return total


def _reads(plan: Plan, table: Table, dice: random.Random) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(plan.ranks)]
    first = 0
    for order, rows in table.heads:
        types = plan.config.model.vocab_size**order
        places = [dice.randrange(rows) + first for _ in range(types)]
        chances = list(itertools.accumulate(1 / place for place in range(1, types + 1)))
        for rank in range(plan.ranks):
            found[rank].update(dice.choices(places, cum_weights=chances, k=plan.tokens))
        first += rows
    return found


@pytest.mark.parametrize("table_ranks", ["all", 2, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exchange_is_that_of_simulated_reads(table_ranks: Any, dtype: str) -> None:
    config = tiny(
        model={"vocab_size": 11, "memory": {"rows_per_head": 300, "table_dtype": dtype}},
        data={"sequence_length": 40},
        train={"batch_size": 12, "micro_batch_size": None},
        distributed={"table_ranks": table_ranks},
    )
    plan = make_plan(config, 4)
    measured = simulate(plan)
    for each in exchanged(plan):
        assert each.estimate == pytest.approx(measured[each.name], rel=0.06), each.name
        assert measured[each.name] < each.at_most
    assert {each.name: each.at_most for each in exchanged(plan)} == {
        "ids of rows": 120 * 6 * 2 * 8,
        "rows": 120 * 6 * 2 * (12 if dtype == "float32" else 6),
        "gradients of rows": 120 * 6 * 2 * 12,
    }


# -------------------------------------------------------------------------------------------------------------- windows


def test_flops_before_a_layer_add_up_to_the_whole() -> None:
    model = tiny(model={"memory": None, "hyper_connection": None}).model
    whole = count_flops(model, 9)
    assert flops_before(model, 0, 9) == 0
    assert flops_before(model, 3, 9) == whole.forward - whole.parts["head"]
    # The first block is dense and of width (1 + 2) x 5, the second and third have experts.
    attention = 2 * (16 * 2 * 10 + 16 * 9 + 5 * 2 * 12 + 2 * 6 * 16) + 2 * (10 + 6) * 10
    assert flops_before(model, 1, 9) == attention + 2 * 3 * 16 * 15
    assert flops_before(model, 2, 9) - flops_before(model, 1, 9) == attention + 2 * 16 * 6 + 2 * 3 * 240


def windows_of(machine: Machine, **changes: Any) -> dict[str, tuple[float, float, str]]:
    config: Config = tiny(distributed={"table_ranks": 2, "expert_ranks": 1}, **changes)
    plan = make_plan(config, 4)
    return {each.name: (each.compute, each.at_most, each.verdict) for each in windows(plan, machine)}


def test_rows_hide_behind_the_blocks_before_the_first_memory() -> None:
    plan = make_plan(tiny(distributed={"table_ranks": 2}), 4)
    # Of 54 tokens, 18 are in the first micro-batch. Two owners serve four ranks: twice the mean.
    compute = flops_before(plan.config.model, 1, 9) * 18
    slow = windows_of(Machine(device_tflops=compute / 1e12, link_gbps=8e-9))
    rows = slow["rows, until block 1"]
    assert rows[:2] == pytest.approx((1.0, _rows_twice(plan)))
    assert rows[2].endswith("ms not hidden")
    # Ids and gradients have nothing to hide behind.
    assert slow["ids of rows"][0] == slow["gradients of rows"][0] == 0
    fast = windows_of(Machine(device_tflops=compute / 1e12, link_gbps=1e9))
    assert fast["rows, until block 1"][2] == "hidden"
    between = 8e-9 * rows[1] * 0.99
    assert windows_of(Machine(device_tflops=compute / 1e12, link_gbps=between))["rows, until block 1"][2] == (
        "hidden by the estimate"
    )


def _rows_twice(plan: Plan) -> int:
    """Bytes of 54 tokens' rows on either of two owners: every head has fewer rows than tokens, or as many reads."""
    return 2 * sum(min(54, rows) * 12 for table in plan.tables for _, rows in table.heads)


@pytest.mark.parametrize(("tier", "speed"), [("host", "host_gbps"), ("file", "file_gbps")])
def test_stored_rows_hide_behind_a_whole_step(tier: str, speed: str) -> None:
    config = tiny(train={"batch_size": 2, "micro_batch_size": None, "tables": {"tier": tier, "cache_rows": 108}})
    plan = make_plan(config, 1)
    flops = count_flops(config.model, 9).training * 18
    # 108 rows of two tables, of 40 bytes with their state, there and back.
    [window] = windows(plan, Machine(device_tflops=flops / 1e12, **{speed: 8e-9}))
    assert (window.compute, window.at_most) == pytest.approx((1.0, 2 * 108 * 40 * 2))
    assert 0 < window.estimate < window.at_most
    again = tiny(train={**config.train.model_dump(), "activation_checkpointing": True})
    [longer] = windows(make_plan(again, 1), Machine(device_tflops=flops / 1e12))
    assert longer.compute == pytest.approx(4 / 3)
