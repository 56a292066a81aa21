"""Statistics against values worked out by hand, and against what the layers really do."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engram.config import Config
from engram.data.loader import Batch
from engram.model.transformer import Transformer
from engram.training.statistics import (
    gate_statistics,
    gradient_norm,
    layer_statistics,
    mix_gain,
    router_statistics,
    table_statistics,
)

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


def values(statistics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in statistics.items()}


def test_router_by_hand() -> None:
    # Loads 4, 2, 2, 0 of 8 choices.
    found = values(router_statistics(torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]]), num_experts=4))
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert found == pytest.approx({"router_max_load": 2.0, "router_entropy": entropy})


def test_even_loads_give_one_and_one_expert_is_even() -> None:
    even = {"router_max_load": 1.0, "router_entropy": 1.0}
    assert values(router_statistics(torch.tensor([[0, 1], [2, 3], [4, 5]]), 6)) == pytest.approx(even)
    assert values(router_statistics(torch.zeros(7, 1, dtype=torch.int64), 1)) == pytest.approx(even)


def test_gates_by_hand() -> None:
    # Stream 0: 0.01 0.5 0.97 0.52; stream 1: 0.04 0.04 0.04 0.96.
    gates = torch.tensor([[[0.01, 0.04], [0.5, 0.04]], [[0.97, 0.04], [0.52, 0.96]]])
    assert values(gate_statistics(gates)) == pytest.approx(
        {
            "gate_mean_0": 0.5,
            "gate_low_0": 0.25,
            "gate_high_0": 0.25,
            "gate_mean_1": 0.27,
            "gate_low_1": 0.75,
            "gate_high_1": 0.25,
        }
    )


def test_rows_by_hand() -> None:
    # Distinct rows 0, 3, 9; a dead token reads none.
    weight = torch.nn.Parameter(torch.zeros(12, 2))
    ids = torch.tensor([[[0, 3], [3, 9]], [[-1, -1], [0, 9]]])
    assert values(table_statistics(ids, len(weight), weight.grad)) == {"rows_touched": 0.25}
    # Row 3 twice: (1, 2) + (2, 2) = (3, 4), and (0, 12) in row 5: norm 13.
    rows, gradients = torch.tensor([[3, 5, 3]]), torch.tensor([[1.0, 2], [0, 12], [2, 2]])
    weight.grad = torch.sparse_coo_tensor(rows, gradients, (12, 2), check_invariants=True)
    assert values(table_statistics(ids, len(weight), weight.grad))["row_grad_norm"] == pytest.approx(13.0)
    assert gradient_norm(weight.grad.to_dense()).item() == pytest.approx(13.0)


def test_mix_gain_by_hand() -> None:
    identity = torch.eye(3).expand(2, 5, 3, 3)
    assert mix_gain(identity).item() == 1.0
    one_token_off = identity.clone()
    # A column of |-0.5| + 1: the gradient of that stream grows by half.
    one_token_off[1, 2, 0, 1] = -0.5
    assert mix_gain(one_token_off).item() == 1.5


@pytest.fixture
def batch() -> Batch:
    tokens = torch.randint(0, 384, (4, 13))
    return Batch(tokens, tokens.roll(-1, 1), (torch.arange(13) > 5).long().expand(4, -1))


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, {"layer_00/attn_mix_gain", "layer_00/ffn_mix_gain", "layer_01/router_entropy", "layer_01/gate_mean_1"}),
        ({"hyper_connection": None}, {"layer_01/router_max_load", "layer_01/gate_low_0", "layer_01/rows_touched"}),
        ({"moe": None, "memory": {"fusion": "single"}}, {"layer_01/gate_high_0", "layer_01/memory_mix_gain"}),
        ({"memory": {"gate": None}}, {"layer_01/gate_mean_1", "layer_01/rows_touched"}),
        ({"moe": None, "memory": None, "hyper_connection": None}, set()),
        (
            {
                "memory": None,
                "over_encoding": {"num_heads": 2, "head_dim": 4, "rows_per_head": 31},
                "hyper_connection": None,
                "moe": None,
            },
            {"over_encoding/rows_touched"},
        ),
    ],
)
def test_layers_report_what_they_have(
    make_config: MakeConfig, batch: Batch, changes: dict[str, Any], keys: set[str]
) -> None:
    model = Transformer(make_config(model=changes).model)
    found = layer_statistics(model, batch, 4, CPU)
    assert keys <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    absent = {"moe": "router", "memory": "gate", "hyper_connection": "mix"}
    for part, word in absent.items():
        assert not (part in changes and changes[part] is None and any(word in key for key in found)), found


def test_values_are_those_of_the_layers_and_nothing_stays_behind(make_config: MakeConfig, batch: Batch) -> None:
    model = Transformer(make_config().model).train()
    model.loss(*batch).backward()
    loads = model.blocks[1].ffn.router.load.clone()
    hooks_before = sum(len(module._forward_hooks) for module in model.modules())
    found = layer_statistics(model, batch, 4, CPU)
    # In eval mode nothing is counted twice, and training mode and hooks are as before.
    assert torch.equal(model.blocks[1].ffn.router.load, loads)
    assert model.training and sum(len(module._forward_hooks) for module in model.modules()) == hooks_before == 0
    assert found["layer_01/router_max_load"] == pytest.approx((loads.max() / loads.mean()).item())
    ids = model.hash_ids(batch.tokens, batch.document_ids)[1]
    rows = model.blocks[1].memory.embed.weight
    assert found["layer_01/rows_touched"] == pytest.approx(len(set(ids.flatten().tolist())) / len(rows))
    assert found["layer_01/row_grad_norm"] == pytest.approx(rows.grad.to_dense().norm().item(), rel=1e-5)
    # Only the first micro-batch is looked at.
    part = layer_statistics(model, batch, 1, CPU)
    ids = model.hash_ids(batch.tokens[:1], batch.document_ids[:1])[1]
    assert part["layer_01/rows_touched"] == pytest.approx(len(set(ids.flatten().tolist())) / len(rows))
