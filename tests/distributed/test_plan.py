"""Which settings go together, and who holds what: an independent list of rules, and counts of the built model."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import Config, UserError, load_config
from engram.distributed.layout import Group
from engram.distributed.plan import Plan, make_plan
from engram.model.transformer import Transformer
from engram.optim.groups import assign_roles
from tests.distributed.plans import tiny

ROOT = Path(__file__).parents[2]
CACHE = {"cache_rows": 10_000}


def allowed(
    ranks: int, stage: int, offload: bool, compiled: bool, table_ranks: Any, tier: str | None, kind: str, over: bool
) -> bool:
    """The table in plan.py, read by a person."""
    rules = [
        stage > 0 or not offload,
        stage < 3 or not compiled,
        tier is None or kind in ("row_adam", "rowwise_adagrad"),
        tier is None or table_ranks is not None or ranks == 1,
        not over or (table_ranks is None and tier is None),
    ]
    return all(rules)


def test_every_combination_is_allowed_or_refused_as_the_table_says() -> None:
    kinds = ("row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam")
    over_encoding = {"num_heads": 1, "head_dim": 4, "rows_per_head": 23}
    outcomes = set()
    for case in itertools.product(
        (1, 2), range(4), (False, True), (False, True), (None, "all", 1), (None, "host", "file"), kinds, (False, True)
    ):
        ranks, stage, offload, compiled, table_ranks, tier, kind, over = case
        expected = allowed(*case)
        for expert_ranks in {1, ranks}:
            try:
                config = tiny(
                    distributed=dict(
                        zero_stage=stage, offload_optimizer=offload, table_ranks=table_ranks, expert_ranks=expert_ranks
                    ),
                    train=dict(compile=compiled, tables=tier and {"tier": tier, **CACHE}),
                    optim={"table": {"kind": kind}},
                    model={"over_encoding": over_encoding if over else None},
                )
                make_plan(config, ranks)
                outcome = True
            except UserError:
                outcome = False
            assert outcome == expected, case
            outcomes.add(outcome)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (2, dict(distributed=None), "2 ranks were started, but distributed is null: give distributed={}, or start one"),
        (5, {}, "train.batch_size 24 cannot be shared equally by 5 ranks: make it a multiple of 5"),
        (
            8,
            {},
            "train.micro_batch_size 2 does not divide the 3 sequences of one of 8 ranks: lower it to a divisor of 3",
        ),
        (
            2,
            dict(distributed={"zero_stage": 3}, train={"compile": True}),
            "train.compile needs distributed.zero_stage 0, 1 or 2: stage 3 divides the layers",
        ),
        (
            2,
            dict(distributed={"zero_stage": 3}, train={"statistics_every": 5}),
            "train.statistics_every needs distributed.zero_stage 0, 1 or 2: stage 3 divides the layers",
        ),
        (
            4,
            dict(distributed={"expert_ranks": 4}),
            "distributed.expert_ranks is 4, but it must divide both model.moe.num_experts 6 and the number of ranks 4: "
            "choose one of 1, 2",
        ),
        (
            2,
            dict(distributed={"expert_ranks": 2}, model={"moe": None}),
            "distributed.expert_ranks is 2, but the model has no experts (model.moe is null): set it to 1",
        ),
        (
            2,
            dict(distributed={"table_ranks": 3}),
            "distributed.table_ranks is 3, but there are 2 ranks: lower it to 2, or to 'all'",
        ),
        (
            2,
            dict(distributed={"table_ranks": "all"}, model={"memory": None}),
            "distributed.table_ranks is 'all', but the model has no tables (model.memory is null): set it to null",
        ),
        (
            2,
            dict(
                distributed={"table_ranks": "all"},
                model={"over_encoding": {"num_heads": 1, "head_dim": 4, "rows_per_head": 23}},
            ),
            "distributed.table_ranks is 'all', but tables of model.over_encoding cannot be divided: set it to null",
        ),
        (
            1,
            dict(train={"tables": {"tier": "file", **CACHE}}, model={"memory": None}),
            "train.tables.tier is 'file', but the model has no tables (model.memory is null): set train.tables to null",
        ),
        (
            1,
            dict(
                train={"tables": {"tier": "file", **CACHE}},
                model={"over_encoding": {"num_heads": 1, "head_dim": 4, "rows_per_head": 23}},
            ),
            "train.tables.tier is 'file', but model.over_encoding keeps its rows on the device: set train.tables to "
            "null",
        ),
        (
            1,
            dict(train={"tables": {"tier": "host", **CACHE}}, optim={"table": {"kind": "sinkhorn"}}),
            "train.tables.tier is 'host', but optim.table.kind sinkhorn moves all rows in every step: use row_adam or "
            "rowwise_adagrad, which move those that were read, or set train.tables to null",
        ),
        (
            2,
            dict(train={"tables": {"tier": "host", **CACHE}}),
            "train.tables.tier is 'host', and each of 2 ranks would keep and update all rows by itself: divide them "
            "among the ranks with distributed.table_ranks=all",
        ),
    ],
)
def test_refusals_tell_the_numbers_and_what_to_change(ranks: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(tiny(**changes), ranks)
    assert str(refused.value) == message


# ---------------------------------------------------------------------------------------------------------- the layout


@given(
    elements=st.integers(1, 10**6),
    parts=st.sampled_from([1, 2, 3, 5]),
    holders=st.integers(1, 70),
)
def test_shares_of_all_ranks_are_the_whole(elements: int, parts: int, holders: int) -> None:
    group = Group("", elements * parts, 1, parts, holders)
    shares = [group.share(rank) for rank in range(parts * holders)]
    assert sum(shares) == group.elements
    assert shares[0] == max(shares)
    # Ranks of one part share it between them: neighbours hold other parts.
    assert sum(shares[::parts]) == group.whole == elements


@given(ranks=st.integers(1, 40), data=st.data())
def test_ranges_of_all_ranks_are_the_table(ranks: int, data: st.DataObject) -> None:
    table_ranks = data.draw(st.one_of(st.none(), st.just("all"), st.integers(1, ranks)))
    plan = make_plan(
        tiny(train={"batch_size": ranks, "micro_batch_size": None}, distributed={"table_ranks": table_ranks}), ranks
    )
    for table in plan.tables:
        if table_ranks is None:
            assert all(rows == range(table.num_rows) for rows in table.ranges)
            continue
        assert [row for rows in table.ranges for row in rows] == list(range(table.num_rows))
        owners = ranks if table_ranks == "all" else table_ranks
        assert all(len(rows) > 0 for rows in table.ranges[:owners])
        assert not any(len(rows) for rows in table.ranges[owners:])


@pytest.mark.parametrize("muon", [{}, None])
def test_groups_and_tables_are_those_of_the_built_model(muon: dict[str, Any] | None) -> None:
    config = tiny(optim={"muon": muon}, model={"over_encoding": {"num_heads": 1, "head_dim": 4, "rows_per_head": 23}})
    plan = make_plan(config, 2)
    assignments = assign_roles(Transformer(config.model).named_parameters(), config.optim)
    counted = {"hidden matrices": 0, "routed experts": 0, "vocabulary, router, vectors": 0}
    tables = {}
    # Without Muon, the hidden matrices are AdamW's: by names then.
    muons = assign_roles(Transformer(config.model).named_parameters(), tiny().optim)
    for each, by_muon in zip(assignments, muons, strict=True):
        if each.role == "table":
            tables[each.name] = tuple(each.shape)
        elif ".experts." in each.name:
            counted["routed experts"] += each.numel
        else:
            counted["hidden matrices" if by_muon.role == "muon" else "vocabulary, router, vectors"] += each.numel
    assert {group.name: group.elements for group in plan.groups} == counted
    assert {group.name: group.moments for group in plan.groups} == {
        "hidden matrices": 1 if muon is not None else 2,
        "routed experts": 1 if muon is not None else 2,
        "vocabulary, router, vectors": 2,
    }
    names = {
        None: "over_encoding.embed.weight",
        1: "blocks.1.memory.embed.weight",
        2: "blocks.2.memory.embed.weight",
    }
    assert {names[table.layer]: (table.num_rows, table.settings.head_dim) for table in plan.tables} == tables


def test_the_rows_of_heads_are_those_that_hashing_addresses() -> None:
    config = tiny()
    model = Transformer(config.model)
    tokens = torch.randint(config.model.vocab_size, (8, 64))
    assert model.hasher is not None
    for table in make_plan(config, 1).tables:
        assert table.layer is not None
        sizes = [size for order in model.hasher.vocab_sizes[table.layer] for size in order]
        assert [rows for _, rows in table.heads] == sizes
        assert [order for order, _ in table.heads] == [2, 2, 2, 3, 3, 3]
        # 512 tokens cannot read more rows than the plan says, of any range.
        read = set(model.hash_ids(tokens)[table.layer].flatten().tolist())
        for rows in (range(40), range(17, 100), range(table.num_rows)):
            for count in (1, 20, 512):
                few = set(model.hash_ids(tokens.flatten()[None, :count])[table.layer].flatten().tolist())
                assert len(few & set(rows)) <= table.rows_at_most(rows, count)
            assert len(read & set(rows)) == table.rows_at_most(rows, 512) == len(rows)


@pytest.mark.parametrize("tokens", [1, 3, 31, 1000])
def test_rows_at_most_counts_every_head_by_itself(tokens: int) -> None:
    [table, _] = make_plan(tiny(), 1).tables
    owner = [head for head, (_, count) in enumerate(table.heads) for _ in range(count)]
    for rows in (range(0), range(1), range(5, 50), range(30, 31), range(table.num_rows)):
        inside = [owner[row] for row in rows]
        assert table.rows_at_most(rows, tokens) == sum(min(tokens, inside.count(head)) for head in range(6))


# ------------------------------------------------------------------------------------------------------------- storage


def stored(ranks: int = 1, tokens: int = 2, **storage: Any) -> tuple[Config, int]:
    """Tokens of a step: so many sequences of 9 for each of the ranks, all of which an owner may have to serve."""
    tables = {"tier": "file", "cache_rows": 10_000, **storage}
    train = {"batch_size": tokens * ranks, "micro_batch_size": None, "tables": tables}
    return tiny(train=train, distributed={"table_ranks": "all"}), ranks


@pytest.mark.parametrize(
    ("ranks", "needed", "text"),
    [
        # 18 tokens, 6 heads of more rows than that.
        (1, 108, "a step of 18 tokens may read 108 rows that rank 0 holds of the table of block 1"),
        # 36 tokens, and half of the second table: heads of 71 to 97 rows.
        (2, None, "a step of 36 tokens may read"),
    ],
)
def test_a_cache_holds_all_rows_that_a_step_may_read(ranks: int, needed: int | None, text: str) -> None:
    plan = make_plan(*stored(ranks))
    most = max(plan.rows_at_most(table, rank) for table in plan.tables for rank in range(ranks))
    assert needed in (None, most)
    make_plan(*stored(ranks, cache_rows=most))
    with pytest.raises(UserError, match=f"train.tables.cache_rows is {most - 1}, but {text}") as refused:
        make_plan(*stored(ranks, cache_rows=most - 1))
    assert f"raise it to {most}, or lower train.batch_size (now {2 * ranks})" in str(refused.value)


def test_host_memory_holds_all_rows_or_those_of_a_step() -> None:
    # Width 3 and row Adam: 12 bytes of a row, 24 of its moments, 4 of its count.
    rows = sum(table.num_rows for table in make_plan(tiny(), 1).tables)
    for tier, needed, advice in (
        ("host", 40 * (rows + 2 * 2 * 108), "all rows, and those that come and go in a step, on rank 0 take"),
        ("file", 40 * 2 * 2 * 108, "the rows that come and go in a step on rank 0 take"),
    ):
        make_plan(*stored(tier=tier, host_memory_gb=needed / 1e9))
        with pytest.raises(UserError, match=advice) as refused:
            make_plan(*stored(tier=tier, host_memory_gb=(needed - 1) / 1e9))
        named = re.search(r"raise it to (\S+), or", str(refused.value))
        assert named is not None and needed / 1e9 <= float(named[1]) <= 1.001 * needed / 1e9
        make_plan(*stored(tier=tier, host_memory_gb=float(named[1])))


# ----------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize(("name", "billions"), [("engram_27b", 5.7923), ("engram_40b", 18.5343)])
@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_the_papers_tables_on_a_cluster(name: str, billions: float, ranks: int) -> None:
    batch = () if ranks < 512 else ("train.batch_size=1536", "train.micro_batch_size=3")
    plan: Plan = make_plan(load_config(ROOT / f"configs/cluster/{name}.yaml", batch), ranks)
    entries = sum(table.num_rows * table.settings.head_dim for table in plan.tables)
    assert entries / 1e9 == pytest.approx(billions, abs=5e-5)
    held = [sum(len(table.ranges[rank]) for table in plan.tables) * 80 for rank in range(ranks)]
    assert sum(held) == entries and max(held) - min(held) <= 2 * 80
    assert sum(group.elements for group in plan.groups) + entries == pytest.approx(
        {"engram_27b": 27.0566e9, "engram_40b": 39.7986e9}[name], rel=1e-4
    )
