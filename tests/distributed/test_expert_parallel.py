"""Experts divided among ranks compute what one process computes, and get its gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from engram.config import ModelConfig, UserError
from engram.distributed.expert_parallel import (
    check_expert_ranks,
    reduce_expert_gradients,
    shard_experts,
    sharded_experts,
    sum_router_loads,
)
from engram.distributed.world import World
from engram.kernels.moe_experts import moe_experts
from engram.model.transformer import Transformer
from tests.distributed.ranks import run_ranks, values

EXPERTS, TOP_K, HIDDEN, VOCABULARY = 8, 2, 16, 31
# Two layers of experts behind a dense one.
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=HIDDEN,
    vocab_size=VOCABULARY,
    attention=dict(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
    moe=dict(num_experts=EXPERTS, top_k=TOP_K, expert_dim=10, num_dense_layers=1, sequence_balance_loss=0.05),
    hyper_connection={},
)
ONE_LAYER = MODEL.model_copy(update=dict(num_layers=2))
# Ranks, and how many of them hold all experts together.
PLANS = [(2, 2), (4, 2), (4, 4)]
# Tokens of each rank (of as many as there are), and how many of the experts are ever chosen.
CASES = {
    "odd numbers of tokens": ([7, 4, 11, 1], EXPERTS),
    "experts without a token": ([6, 5, 3, 8], EXPERTS // 2 + 1),
    "only the first rank of each group receives": ([3, 5, 2, 6], TOP_K),
    "ranks that send nothing": ([0, 9, 0, 4], EXPERTS),
    "nothing at all": ([0, 0, 0, 0], EXPERTS),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def build(config: ModelConfig) -> Transformer:
    torch.manual_seed(11)
    model = Transformer(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for every part of the model to matter.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-6) -> None:
    """By the norm of the difference: sums are taken in another order."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    error = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name} is off by {error:.1e}"


def make_inputs(tokens: int, experts: int) -> Inputs:
    ids = torch.rand(tokens, experts).argsort(1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP_K), torch.randn(tokens, HIDDEN)


def run_layer(world: World, expert_ranks: int, inputs: dict[str, list[Inputs]]) -> dict[str, dict[str, Tensor]]:
    model = build(ONE_LAYER)
    shard_experts(model, world, expert_ranks)
    ((_, experts),) = sharded_experts(model).items()
    results = {}
    for case, parts in inputs.items():
        x, ids, weights, dy = parts[world.rank]
        x, weights = x.requires_grad_(), weights.requires_grad_()
        model.zero_grad()
        y = experts(x, ids, weights)
        y.backward(dy)
        reduce_expert_gradients(model)
        grads = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
        results[case] = dict(y=y.detach(), x=x.grad, weights=weights.grad, **grads)
    return results


@pytest.mark.parametrize(("size", "expert_ranks"), PLANS)
def test_outputs_and_gradients_are_those_of_one_process(size: int, expert_ranks: int, tmp_path: Path) -> None:
    inputs = {case: [make_inputs(n, experts) for n in tokens[:size]] for case, (tokens, experts) in CASES.items()}
    results = values(run_ranks(size, run_layer, expert_ranks, inputs, folder=tmp_path))

    whole = build(ONE_LAYER).blocks[1].ffn.experts
    here = EXPERTS // expert_ranks
    for case, parts in inputs.items():
        x, ids, weights, dy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        x, weights = x.requires_grad_(), weights.requires_grad_()
        whole.zero_grad()
        y = moe_experts(x, ids, weights, whole.gate_up, whole.down)
        y.backward(dy)
        expected = dict(y=y.detach(), x=x.grad, weights=weights.grad)
        for name, tensor in expected.items():
            close(torch.cat([result[case][name] for result in results]), tensor, f"{case}: {name}")
        for rank, result in enumerate(results):
            own = slice(rank % expert_ranks * here, (rank % expert_ranks + 1) * here)
            for name in ("gate_up", "down"):
                close(result[case][name], getattr(whole, name).grad[own], f"{case}: {name} of rank {rank}")


def count_rows(world: World, ids: list[Tensor]) -> tuple[list[int], list[int]]:
    model = build(ONE_LAYER)
    shard_experts(model, world, 2)
    sizes: list[int] = []
    exchange = distributed.all_to_all_single

    def counted(output: Tensor, rows: Tensor, *arguments: object, **options: object) -> object:
        sizes.append(len(rows))
        return exchange(output, rows, *arguments, **options)

    distributed.all_to_all_single = counted
    own = ids[world.rank]
    model.blocks[1].ffn.experts(torch.randn(len(own), HIDDEN), own, torch.rand(own.shape))
    return sizes, own.tolist()


def test_a_token_travels_once_to_each_rank_that_has_any_of_its_experts(tmp_path: Path) -> None:
    ids = [torch.rand(n, EXPERTS).argsort(1)[:, :TOP_K] for n in (13, 8)]
    results = values(run_ranks(2, count_rows, ids, folder=tmp_path))
    travelled = [sum(len({e // (EXPERTS // 2) for e in choices}) for choices in own) for _, own in results]
    back = sum(travelled)
    for (sizes, _), rows in zip(results, travelled, strict=True):
        # Counts; rows, weights and ids; results.
        assert sizes[:4] == [2, rows, rows, rows] and len(sizes) == 5
        back -= sizes[4]
    assert back == 0
    assert sum(travelled) < 2 * sum(map(len, ids)), "some token must have both experts on one rank"


def run_model(world: World, expert_ranks: int, tokens: Tensor, checkpointing: bool) -> dict[str, object]:
    model = build(MODEL)
    model.activation_checkpointing = checkpointing
    names = list(model.state_dict())
    shard_experts(model, world, expert_ranks)
    total = 0.0
    # Two micro-batches of one sequence.
    for sequence in tokens.view(world.size, 2, 1, -1)[world.rank]:
        loss = model.loss(sequence[:, :-1], sequence[:, 1:]) / (2 * world.size)
        loss.backward()
        total += loss.detach()
    reduce_expert_gradients(model)
    sum_router_loads(model, world)
    loads = [block.ffn.router.load.clone() for block in model.blocks[1:]]
    experts = {id(parameter) for module in sharded_experts(model).values() for parameter in module.parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad if id(parameter) in experts else world.sum(parameter.grad)
    with torch.no_grad():
        evaluated = model.eval()(tokens[:1, :-1])
    return dict(
        same_names=names == list(model.state_dict()),
        loss=world.sum(total),
        gradients=gradients,
        loads=loads,
        evaluated=evaluated,
    )


@pytest.mark.parametrize(("size", "expert_ranks", "checkpointing"), [(2, 2, False), (4, 2, True)])
def test_a_model_has_the_loss_and_gradients_of_one_process(
    size: int, expert_ranks: int, checkpointing: bool, tmp_path: Path
) -> None:
    tokens = torch.randint(0, VOCABULARY, (2 * size, 14))
    results = values(run_ranks(size, run_model, expert_ranks, tokens, checkpointing, folder=tmp_path))

    model = build(MODEL)
    # In the micro-batches that ranks take, so that what differs is what ranks do.
    loss = torch.zeros(())
    for sequence in tokens.split(1):
        part = model.loss(sequence[:, :-1], sequence[:, 1:]) / len(tokens)
        part.backward()
        loss += part.detach()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    loads = [block.ffn.router.load for block in model.blocks[1:]]
    with torch.no_grad():
        evaluated = model.eval()(tokens[:1, :-1])
    for rank, result in enumerate(results):
        assert result["same_names"]
        close(result["loss"], loss, "loss")
        close(result["evaluated"], evaluated, "logits")
        for own, whole in zip(result["loads"], loads, strict=True):
            assert own.tolist() == whole.tolist() and own.sum() == 2 * size * 13 * TOP_K
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in result["gradients"].items():
            whole = expected[name]
            if ".experts." in name:
                whole = whole.chunk(expert_ranks)[rank % expert_ranks]
            close(gradient, whole, f"{name} of rank {rank}", 2e-6)


@pytest.mark.parametrize(
    ("changes", "expert_ranks", "world_size", "message"),
    [
        (
            {},
            3,
            6,
            "distributed.expert_ranks is 3, but it must divide both model.moe.num_experts 8 and the number of ranks 6: "
            "choose one of 1, 2",
        ),
        (
            {},
            8,
            12,
            "distributed.expert_ranks is 8, but it must divide both model.moe.num_experts 8 and the number of ranks "
            "12: choose one of 1, 2, 4",
        ),
        (
            dict(moe=None),
            2,
            4,
            "distributed.expert_ranks is 2, but the model has no experts (model.moe is null): set it to 1",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(
    changes: dict[str, object], expert_ranks: int, world_size: int, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_expert_ranks(MODEL.model_copy(update=changes), expert_ranks, world_size)
    assert str(refused.value) == message
    check_expert_ranks(MODEL.model_copy(update=changes), 1, world_size)
