from itertools import product

import pytest
import torch
from torch import nn

from engram.config import ModelConfig, MuonConfig, OptimConfig, TableOptimConfig
from engram.model.transformer import Transformer
from engram.optim.groups import RULES, RoleError, Rule, assign_roles, roles_table

from .helpers import model_parameters, model_shapes

OPTIM = OptimConfig(weight_decay=0.1, table=TableOptimConfig(lr_multiplier=5.0, weight_decay=0.02))
TABLES = {"over_encoding.embed.weight", "blocks.1.memory.embed.weight"}
DECAYED = {"embed.weight", "head.weight"}
HIDDEN = ("_proj.weight", ".proj.weight", "wkv.weight", "gate_up", "gate_up.weight", "experts.down", "down.weight")

MUON_FOR_ALL = (Rule("*", "muon", True, None),)


def test_every_parameter_has_its_role(generator: torch.Generator) -> None:
    parameters = model_parameters(model_shapes(), generator)
    rows = {row.name: row for row in assign_roles(parameters.items(), OPTIM)}
    assert list(rows) == list(parameters)
    for name, row in rows.items():
        assert row.parameter is parameters[name]
        if name in TABLES:
            expected = ("table", 5.0, 0.02)
        elif name.endswith(HIDDEN):
            expected = ("muon", 1.0, 0.1)
        else:
            expected = ("adamw", 1.0, 0.1 if name in DECAYED else 0.0)
        assert (row.role, row.lr_multiplier, row.weight_decay) == expected, name
    assert sum(row.role == "muon" for row in rows.values()) == 2 + 2 * 5 + 2 + 4
    assert sum(row.role == "table" for row in rows.values()) == 2


@pytest.mark.parametrize("streams", [1, 4])
def test_keys_and_value_of_the_memory_are_matrices_of_their_own(streams: int) -> None:
    attention = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
    memory = {"layer_ids": [0], "num_heads": 2, "head_dim": 4, "rows_per_head": 31}
    connection = {"hc_mult": streams} if streams > 1 else None
    sizes = {"num_layers": 1, "hidden_size": 12, "vocab_size": 37, "attention": attention}
    model = Transformer(ModelConfig(**sizes, memory=memory, hyper_connection=connection))
    rows = {row.name: row for row in assign_roles(model.named_parameters(), OPTIM)}
    assert {name: row.matrices for name, row in rows.items() if row.matrices > 1} == {
        "blocks.0.memory.wkv.weight": streams + 1
    }
    assert f"  {streams + 1} * 12 x 16  " in roles_table(list(rows.values()))
    # Only Muon looks at a parameter as matrices.
    plain = assign_roles(model.named_parameters(), OPTIM.replace(muon=None))
    assert {row.matrices for row in plain} == {1}


@pytest.mark.parametrize(("columns", "found"), [(5, "has 5"), (None, "is not there")])
def test_rows_that_are_no_whole_matrices_are_an_error(columns: int | None, found: str) -> None:
    rules = (Rule("wkv", "muon", True, None, rows_as="embed"), Rule("embed", "adamw", True, None))
    parameters = {"wkv": nn.Parameter(torch.ones(12, 3))}
    if columns is not None:
        parameters["embed"] = nn.Parameter(torch.ones(7, columns))
    with pytest.raises(RoleError, match=f"wkv has 12 rows, in matrices of as many as embed has columns, .* {found}: "):
        assign_roles(parameters.items(), OPTIM, rules)


def test_null_muon_sends_hidden_matrices_to_adamw_with_decay(generator: torch.Generator) -> None:
    parameters = model_parameters(model_shapes(), generator)
    with_muon = assign_roles(parameters.items(), OPTIM)
    without = assign_roles(parameters.items(), OPTIM.replace(muon=None))
    for before, after in zip(with_muon, without, strict=True):
        assert after.role == ("adamw" if before.role == "muon" else before.role)
        assert after.weight_decay == before.weight_decay


@pytest.mark.parametrize(("memory", "experts", "connections"), list(product([True, False], repeat=3)))
def test_models_without_a_part_are_covered(
    memory: bool, experts: bool, connections: bool, generator: torch.Generator
) -> None:
    parameters = model_parameters(model_shapes(memory, experts, connections), generator)
    rows = assign_roles(parameters.items(), OPTIM)
    assert len(rows) == len(parameters)
    assert any(row.role == "table" for row in rows) == memory


def test_optional_parameters_may_be_absent(generator: torch.Generator) -> None:
    shapes = model_shapes()
    for name in ("wkv.bias", "conv.weight", "conv_norm"):
        del shapes[f"blocks.1.memory.{name}"]
    for name in ("gate_up", "down"):
        del shapes[f"blocks.1.ffn.shared.{name}.weight"]
    assert len(assign_roles(model_parameters(shapes, generator).items(), OPTIM)) == len(shapes)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.q_proj.lora", "memory.embed.weight", "blocks.1.memory.table.weight", "lm_head.weight"]
)
def test_uncovered_parameter_is_an_error_that_names_it(name: str, generator: torch.Generator) -> None:
    parameters = model_parameters(model_shapes() | {name: (3, 3)}, generator)
    with pytest.raises(RoleError, match=f"parameter {name} has no optimizer role"):
        assign_roles(parameters.items(), OPTIM)


@pytest.mark.parametrize(
    ("missing", "witness"),
    [
        ("blocks.1.memory.embed.weight", "blocks.1.memory"),
        ("blocks.1.ffn.experts.gate_up", "blocks.1.ffn.router.weight"),
        ("blocks.1.memory.conv_norm", "blocks.1.memory.conv.weight"),
        ("head.weight", "blocks."),
        ("over_encoding.proj.weight", "over_encoding.embed.weight"),
    ],
)
def test_rule_without_a_match_is_an_error_if_its_part_is_there(
    missing: str, witness: str, generator: torch.Generator
) -> None:
    shapes = model_shapes()
    del shapes[missing]
    with pytest.raises(RoleError, match="matches no parameter") as caught:
        assign_roles(model_parameters(shapes, generator).items(), OPTIM)
    assert missing.replace("blocks.1", "blocks.*") in str(caught.value)
    assert f"although there is {witness}" in str(caught.value)


def test_first_match_wins() -> None:
    rules = (Rule("a.*", "muon", True, None), Rule("*", "adamw", False, None))
    parameters = {"a.weight": nn.Parameter(torch.ones(2, 3)), "b.weight": nn.Parameter(torch.ones(2, 3))}
    assert [row.role for row in assign_roles(parameters.items(), OPTIM, rules)] == ["muon", "adamw"]
    assert [row.role for row in assign_roles(parameters.items(), OPTIM, rules[::-1])] == ["adamw", "adamw"]


def test_no_rule_is_shadowed_by_an_earlier_one(generator: torch.Generator) -> None:
    parameters = model_parameters(model_shapes(), generator)
    for index, rule in enumerate(RULES):
        others = RULES[:index] + RULES[index + 1 :]
        with pytest.raises(RoleError, match="has no optimizer role"):
            assign_roles(parameters.items(), OPTIM, others)
        assert rule.pattern not in {other.pattern for other in others}


def test_tied_repeated_and_flat_parameters_are_errors() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RoleError, match=r"head\.weight is the same parameter as embed\.weight"):
        assign_roles([("embed.weight", weight), ("head.weight", weight)], OPTIM)
    with pytest.raises(RoleError, match=r"2 parameters are called embed\.weight"):
        assign_roles([("embed.weight", weight), ("embed.weight", nn.Parameter(torch.ones(1)))], OPTIM)
    with pytest.raises(RoleError, match="Muon needs matrices"):
        assign_roles([("blocks.0.attn.o_proj.weight", nn.Parameter(torch.ones(3)))], OPTIM, MUON_FOR_ALL)


def test_table_is_readable(generator: torch.Generator) -> None:
    names = ["embed.weight", "head.weight", "norm.weight"]
    for block in (0, 1, 2, 4):
        names += [f"blocks.{block}.attn_norm.weight", f"blocks.{block}.attn.o_proj.weight"]
    names.append("blocks.2.memory.embed.weight")
    shapes = {"embed.weight": (1000, 6), "blocks.2.memory.embed.weight": (31, 3)}
    parameters = [
        (name, nn.Parameter(torch.ones(shapes.get(name, (6,) if "norm" in name else (6, 8))))) for name in names
    ]
    rules = [rule for rule in RULES if rule.part != "blocks.*.memory.*" or rule.role == "table"]
    optim = OPTIM.replace(muon=MuonConfig())
    assert roles_table(assign_roles(parameters, optim, rules)).splitlines() == [
        "parameter                          shape     count  elements  role   lr x  decay",
        "--------------------------------------------------------------------------------",
        "embed.weight                       1000 x 6      1     6,000  adamw     1    0.1",
        "head.weight                        6 x 8         1        48  adamw     1    0.1",
        "norm.weight                        6             1         6  adamw     1      0",
        "blocks.{0-2,4}.attn_norm.weight    6             4        24  adamw     1      0",
        "blocks.{0-2,4}.attn.o_proj.weight  6 x 8         4       192  muon      1    0.1",
        "blocks.2.memory.embed.weight       31 x 3        1        93  table     5   0.02",
        "elements by role: adamw 6,078, muon 192, table 93",
    ]
