"""Counts: the paper's totals, and the built model to the last parameter."""

from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram.config import ModelConfig, OptimConfig, load_config
from engram.model.accounting import cost, count_bytes, count_flops, count_parameters, describe, rho
from engram.model.transformer import Transformer
from engram.optim.optimizer import build_optimizer

PAPER = Path(__file__).parents[2] / "configs" / "paper"
BASES = ("allocation_5_7b", "allocation_9_9b")


def paper_model(name: str) -> ModelConfig:
    """The shipped model; an allocation base without memory, as its header counts it."""
    return load_config(PAPER / f"{name}.yaml", ["model.memory=null"] if name in BASES else []).model


@pytest.mark.parametrize(
    ("name", "total", "with_one_vocabulary_matrix", "activated", "memory", "share"),
    [
        ("dense_4b", 3.8026, 4.13, 3.8026, 0, 1.0),
        ("moe_27b", 26.3864, 26.72, 3.8079, 0, 1.0),
        ("engram_27b", 26.3947, 26.73, 3.8396, 5.7923, 0.7432),
        ("engram_40b", 39.1367, 39.47, 3.8396, 18.5343, None),
        ("allocation_5_7b", 5.739, None, 0.568, 0, 1.0),
        ("allocation_9_9b", 9.926, None, 0.990, 0, 1.0),
    ],
)
def test_paper_counts(
    name: str,
    total: float,
    with_one_vocabulary_matrix: float | None,
    activated: float,
    memory: float,
    share: float | None,
) -> None:
    model = paper_model(name)
    counts = count_parameters(model)
    digits = 3 if name in BASES else 4
    billions = [count / 1e9 for count in (counts.total, counts.activated, counts.memory)]
    # Half a unit of the last digit that is given, and as much again for the reference's own rounding.
    assert billions == pytest.approx([total, activated, memory], abs=10.0**-digits)
    assert counts.sparse == counts.total - counts.activated
    if with_one_vocabulary_matrix:
        assert round((counts.total + counts.vocabulary // 2) / 1e9, 2) == with_one_vocabulary_matrix
    if share is not None:
        assert rho(model) == pytest.approx(share, abs=5e-5)


def test_memory_of_v4_1_has_the_rows_of_the_released_checkpoint() -> None:
    assert count_parameters(paper_model("v4_1_flash_memory")).memory == (384_006_168 + 384_016_682) * 256


@pytest.mark.parametrize("experts", [46, 57, 66, 76, 81, 86, 91, 96, 101, 106])
def test_rho_follows_the_papers_expert_counts(experts: int) -> None:
    """What the removed experts held goes to memory: the paper's points have rho = (E - 6) / (106 - 6)."""
    base = paper_model("allocation_5_7b")
    assert base.moe is not None
    memory = load_config(PAPER / "allocation_5_7b.yaml").model.memory
    assert memory is not None
    freed = 11 * (106 - experts) * 3 * 1280 * 1224
    rows = freed // (2 * 2 * 8 * memory.head_dim)
    if rows:
        model = base.replace(
            moe=base.moe.replace(num_experts=experts), memory=memory.replace(rows_per_head=(rows, rows))
        )
        assert rho(model) == pytest.approx((experts - 6) / 100, abs=2e-4)
    else:
        assert rho(base) == 1.0


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models over all the switches that change what a model holds."""
    layers, count = draw(st.integers(1, 4)), st.integers(1, 5)
    tables = {"num_heads": count, "head_dim": count, "rows_per_head": st.integers(2, 60), "pad_id": st.just(0)}
    orders = {"max_ngram_size": st.integers(2, 4), "compression": st.booleans()}
    memory = {
        **tables,
        **orders,
        "layer_ids": st.sets(st.integers(0, layers - 1), min_size=1).map(sorted),
        "gate": st.sampled_from(["signed_sqrt", "plain", None]),
        "conv": st.booleans() | st.fixed_dictionaries({"kernel_size": st.integers(2, 5)}),
        "fusion": st.sampled_from(["per_stream", "single"]),
        "projection_bias": st.booleans(),
    }
    moe = {
        "num_experts": st.integers(3, 7),
        "top_k": st.integers(1, 3),
        "expert_dim": count,
        "num_shared_experts": st.integers(0, 2),
        "shared_dim": st.none() | st.integers(0, 5),
        "num_dense_layers": st.integers(0, layers),
    }
    attention = {
        "num_heads": count,
        "kv_lora_rank": count,
        "qk_nope_head_dim": count,
        "qk_rope_head_dim": st.sampled_from([2, 4]),
        "v_head_dim": count,
        "q_lora_rank": st.none() | count,
    }
    tree = draw(
        st.fixed_dictionaries(
            {
                "num_layers": st.just(layers),
                "hidden_size": st.integers(1, 9),
                "vocab_size": st.integers(2, 40),
                "ffn_dim": st.none() | count,
                "attention": st.fixed_dictionaries(attention),
                "moe": st.none() | st.fixed_dictionaries(moe),
                "hyper_connection": st.none() | st.fixed_dictionaries({"hc_mult": st.integers(1, 4)}),
                "memory": st.none() | st.fixed_dictionaries(memory),
                "over_encoding": st.none() | st.fixed_dictionaries({**tables, **orders}),
            }
        )
    )
    return ModelConfig(**tree)


# First match wins: (pattern of the parameter's name, part, role).
NAMES = [
    ("*memory.embed.weight", "memory tables", "table"),
    ("*memory.wkv.weight", "memory projections", "muon"),
    ("*memory.wkv.bias", "memory projections", "adamw"),
    ("*memory.[qk]_weight", "memory gains", "adamw"),
    ("*memory.conv*", "memory convolution", "adamw"),
    ("over_encoding.embed.weight", "over-encoding tables", "table"),
    ("over_encoding.proj.weight", "over-encoding projection", "muon"),
    ("*_connection.*", "hyper-connections", "adamw"),
    ("readout.*", "hyper-connections", "adamw"),
    ("*norm.weight", "norms", "adamw"),
    ("*.attn.*", "attention", "muon"),
    ("*.ffn.router.weight", "router", "adamw"),
    ("*.ffn.experts.*", "routed experts", "muon"),
    ("*.ffn.shared.*", "shared experts", "muon"),
    ("*.ffn.*", "dense feed-forward", "muon"),
    ("embed.weight", "vocabulary", "adamw"),
    ("head.weight", "vocabulary", "adamw"),
]


@settings(max_examples=60)
@given(models())
def test_counts_are_those_of_the_built_model(model: ModelConfig) -> None:
    with torch.device("meta"):
        built = Transformer(model)
    parts, roles, activated = Counter[str](), Counter[str](), 0
    for name, parameter in built.named_parameters():
        part, role = next((part, role) for pattern, part, role in NAMES if fnmatch(name, pattern))
        parts[part] += parameter.numel()
        roles[role] += parameter.numel()
        if part == "routed experts":
            assert model.moe is not None
            activated += parameter.numel() // model.moe.num_experts * model.moe.top_k
        elif part != "vocabulary" and role != "table":
            activated += parameter.numel()
    activated += len(model.memory.layer_ids) * model.memory.d_mem if model.memory else 0
    activated += model.over_encoding.d_mem if model.over_encoding else 0

    counts = count_parameters(model)
    assert counts.total + counts.vocabulary == sum(parameter.numel() for parameter in built.parameters())
    assert counts.vocabulary == parts.pop("vocabulary")
    counted = Counter[str]()
    for row in counts.parts:
        counted[row.name] += row.parameters
    assert counted == parts
    assert +Counter(counts.roles) == roles
    assert counts.activated == activated
    assert counts.memory == roles["table"]
    assert 0 <= rho(model) <= 1


def small_model(**changes: Any) -> ModelConfig:
    attention = {"num_heads": 3, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
    tree = {"num_layers": 2, "hidden_size": 12, "vocab_size": 31, "ffn_dim": 7, "attention": attention, **changes}
    return ModelConfig(**tree)


def test_flops_are_what_torch_counts() -> None:
    """Without experts and streams every product is one that torch sees; its attention scores are not causal."""
    tables = {"num_heads": 2, "head_dim": 3, "rows_per_head": 11}
    model = small_model(memory={**tables, "layer_ids": [1], "conv": None}, over_encoding=tables)
    built, length = Transformer(model), 13
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention of CPUs.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(torch.randint(31, (1, length), generator=torch.Generator().manual_seed(0)))
    flops = count_flops(model, length)
    scores = flops.parts["attention scores"]
    full_scores = scores * 2 * length // (length + 1)
    assert counter.get_total_flops() == length * (flops.forward - scores + full_scores)
    assert flops.training == 3 * flops.forward


def test_flops_of_experts_and_streams_by_hand() -> None:
    moe = {"num_experts": 8, "top_k": 3, "expert_dim": 5, "num_shared_experts": 2, "num_dense_layers": 0}
    parts = count_flops(small_model(moe=moe, hyper_connection={"hc_mult": 4}), 9).parts
    assert parts["routed experts"] == 2 * 2 * 3 * (3 * 12 * 5)
    assert parts["shared experts"] == 2 * 2 * (3 * 12 * 10)
    assert parts["router"] == 2 * 2 * 8 * 12
    # Four connections of 24 coefficients and the readout's four, all from the 48 entries of the flattened streams.
    assert parts["hyper-connections"] == 2 * (4 * 24 + 4) * 48
    assert parts["stream mixing"] == 2 * (4 * (4 + 16 + 4) + 4) * 12
    # Two layers, three heads; on average 5 of 9 positions, each with 8 + 6 - 2 = 12 multiply-adds.
    assert parts["attention scores"] == 2 * 3 * 5 * 2 * (4 + 2 + 6)
    assert parts["head"] == 2 * 31 * 12
    assert "dense feed-forward" not in parts


@pytest.mark.parametrize(
    ("kind", "gradient_rows", "state_numbers"),
    # The table has 11 + 13 + 17 + 19 = 60 rows of 3; five tokens read 4 rows each. Row Adam counts each row's updates.
    [("row_adam", 20, 360 + 60), ("rowwise_adagrad", 20, 60), ("sinkhorn", 20, 180), ("dense_adam", None, 360)],
)
def test_bytes_of_tables(kind: str, gradient_rows: int | None, state_numbers: int) -> None:
    model = small_model(memory={"num_heads": 2, "head_dim": 3, "rows_per_head": 11, "layer_ids": [1]})
    counts = count_bytes(model, OptimConfig(table={"kind": kind}), tokens_per_step=5)
    table = counts.roles["table"]
    assert table.parameters == 4 * 180
    # A row's gradient travels with its int64 index.
    assert table.gradients == (4 * 180 if gradient_rows is None else gradient_rows * (3 * 4 + 8))
    assert table.state == 4 * state_numbers
    assert counts.total == sum(role.total for role in counts.roles.values())


@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn"])
def test_bfloat16_halves_tables_and_nothing_else(kind: str) -> None:
    tables = {"num_heads": 2, "head_dim": 3, "rows_per_head": 11}
    optim = OptimConfig(table={"kind": kind})
    bytes_of = {
        dtype: count_bytes(
            small_model(memory={**tables, "layer_ids": [1], "table_dtype": dtype}, over_encoding=tables), optim, 5
        ).roles
        for dtype in ("float32", "bfloat16")
    }
    plain, coarse = bytes_of["float32"].pop("table"), bytes_of["bfloat16"].pop("table")
    assert bytes_of["float32"] == bytes_of["bfloat16"]
    # The memory's table has 180 entries; that of over-encoding stays float32.
    assert coarse.parameters == plain.parameters - 2 * 180
    assert (coarse.gradients, coarse.state) == (plain.gradients, plain.state)


def test_gradient_rows_never_outnumber_the_table() -> None:
    model = small_model(memory={"num_heads": 2, "head_dim": 3, "rows_per_head": 11, "layer_ids": [1]})
    assert count_bytes(model, OptimConfig(), tokens_per_step=10**6).roles["table"].gradients == 60 * (3 * 4 + 8)


@pytest.mark.parametrize("muon", [{}, None])
@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam"])
def test_bytes_are_those_of_the_built_optimizer(kind: str, muon: dict[str, Any] | None) -> None:
    tables = {"num_heads": 2, "head_dim": 3, "rows_per_head": 11}
    moe = {"num_experts": 4, "top_k": 2, "expert_dim": 5}
    dtype = "float32" if kind == "dense_adam" else "bfloat16"
    memory = {**tables, "layer_ids": [0, 1], "projection_bias": True, "table_dtype": dtype}
    model = small_model(memory=memory, moe=moe, over_encoding=tables, hyper_connection={"hc_mult": 2})
    optim = OptimConfig(muon=muon, table={"kind": kind})
    built = Transformer(model)
    state = build_optimizer(built.named_parameters(), optim).tensors().values()
    counts = count_bytes(model, optim, tokens_per_step=5)
    assert sum(role.parameters for role in counts.roles.values()) == sum(p.nbytes for p in built.parameters())
    assert sum(role.state for role in counts.roles.values()) == sum(tensor.nbytes for tensor in state)
    for name in ("muon", "adamw"):
        assert counts.roles[name].gradients == counts.roles[name].parameters


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_header_states_the_computed_cost(path: Path) -> None:
    overrides = ["model.memory=null"] if path.stem in BASES else []
    header = path.read_text().split("\n\n")[0]
    assert f"# Command:  {' '.join(['python train.py', f'configs/paper/{path.name}', *overrides])}\n" in header
    assert f"# Cost:     {cost(load_config(path, overrides))}\n" in header
    assert "# Expected: " in header
    assert "# Not run here: " in header


def test_description_shows_parts_and_totals() -> None:
    text = describe(load_config(PAPER / "engram_27b.yaml"))
    counts = count_parameters(paper_model("engram_27b"))
    assert all(part.name in text for part in counts.parts)
    assert f"{counts.total:,}" in text
    assert f"{counts.activated:,}" in text
    assert "rho 0.743" in text
