"""A Backbone over divided experts trains as one process does, in every stage of ZeRO."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engram.config import Config, parse_config
from engram.distributed.world import World
from tests.distributed import backbones
from tests.distributed.backbones import RankProcess, SingleProcess, Snapshot, tiny_config
from tests.distributed.ranks import run_ranks, values

STEPS = 3
# By number of ranks: ZeRO stage, optimizer state in host memory, activation checkpointing.
KINDS = {2: [(0, False, True), (2, True, False)], 4: [(0, False, False), (1, False, False), (3, False, True)]}


def config(stage: int, offload: bool) -> Config:
    settings: dict[str, Any] = tiny_config(stage, offload).model_dump(mode="json")
    settings["model"]["moe"]["num_experts"] = 4
    settings["distributed"]["expert_ranks"] = 2
    return parse_config(settings)


def train(world: World) -> list[dict[str, Any]]:
    # Three rows for each of four ranks.
    backbones.MICRO = 1
    results = []
    for stage, offload, checkpointing in KINDS[world.size]:
        process = RankProcess(world, config(stage, offload), checkpointing=checkpointing)
        loss, norm = process.gradient(0)
        gradients = {name: gradient.clone() for name, gradient in process.backbone.gradients()}
        process.apply()
        snapshot = process.snapshot()
        losses = process.losses(range(1, STEPS))
        process.restore(snapshot)
        again = process.losses(range(1, STEPS))
        process.backbone.close()
        results.append(dict(losses=[loss, *losses], again=again, norm=norm, gradients=gradients, snapshot=snapshot))
    return results


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, whole in expected.items():
        assert actual[name].shape == whole.shape, name
        error = float((actual[name].double() - whole.double()).norm() / whole.double().norm().clamp(min=1e-6))
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("size", KINDS)
def test_every_stage_trains_as_one_process(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "MICRO", 1)
    single = SingleProcess(config(0, False))
    loss, norm = single.gradient(0)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in single.model.named_parameters()
        if not parameter.grad.is_sparse
    }
    single.apply()
    parameters = {name: parameter.detach().clone() for name, parameter in single.model.named_parameters()}
    state = {key: tensor.clone() for key, tensor in single.optimizer.tensors().items()}
    losses = [loss, *single.losses(range(1, STEPS))]
    for rank in values(run_ranks(size, train, folder=tmp_path)):
        for result in rank:
            assert result["losses"] == pytest.approx(losses, abs=1e-5)
            assert result["again"] == pytest.approx(losses[1:], abs=1e-5)
            assert result["norm"] == pytest.approx(norm, rel=1e-6)
            assert result["gradients"].keys() == gradients.keys()
            close(result["gradients"], gradients, 3e-6)
            snapshot: Snapshot = result["snapshot"]
            close(snapshot.model, parameters, 1e-5)
            assert snapshot.optimizer.keys() == state.keys()
            close(snapshot.optimizer, state, 1e-5)
