import pytest
import torch
from torch import Tensor, nn

from engram.config import MuonConfig, OptimConfig, TableOptimConfig
from engram.optim.groups import RoleError
from engram.optim.optimizer import OptimizerStateError, RoleOptimizer, build_optimizer

from .helpers import gradient_of, model_parameters, model_shapes, set_gradients

KINDS = ("row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam")
MUON = MuonConfig()
TABLE = "blocks.1.memory.embed.weight"


def build(
    kind: str = "row_adam", muon: MuonConfig | None = MUON, device: str = "cpu"
) -> tuple[dict[str, nn.Parameter], RoleOptimizer]:
    parameters = model_parameters(model_shapes(), torch.Generator().manual_seed(11))
    parameters = {name: nn.Parameter(parameter.detach().to(device)) for name, parameter in parameters.items()}
    optim = OptimConfig(muon=muon, table=TableOptimConfig(kind=kind))  # type: ignore[arg-type]
    return parameters, build_optimizer(parameters.items(), optim)


def train(parameters: dict[str, nn.Parameter], optimizer: RoleOptimizer, steps: range, device: str = "cpu") -> None:
    """Each step's gradients depend on its number alone; at odd steps one parameter of each role has none."""
    for step in steps:
        set_gradients(parameters, torch.Generator().manual_seed(100 + step), device)
        if step % 2:
            for name in (TABLE, "head.weight", "blocks.0.attn.o_proj.weight"):
                parameters[name].grad = None
        optimizer.step(0.01 / (step + 1))
        optimizer.zero_grad()


def snapshot(optimizer: RoleOptimizer) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in optimizer.tensors().items()}


@pytest.mark.parametrize("muon", [MUON, None], ids=["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(kind: str, muon: MuonConfig | None) -> None:
    straight, straight_optimizer = build(kind, muon)
    train(straight, straight_optimizer, range(7))

    first, first_optimizer = build(kind, muon)
    train(first, first_optimizer, range(3))
    weights = {name: parameter.detach().clone() for name, parameter in first.items()}
    tensors, scalars = snapshot(first_optimizer), first_optimizer.scalars()

    resumed, resumed_optimizer = build(kind, muon)
    for name, parameter in resumed.items():
        parameter.data.copy_(weights[name])
    resumed_optimizer.load_tensors(tensors)
    resumed_optimizer.load_scalars(scalars)
    train(resumed, resumed_optimizer, range(3, 7))

    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name]), name
    assert straight_optimizer.scalars() == resumed_optimizer.scalars()
    for key, tensor in straight_optimizer.tensors().items():
        assert torch.equal(tensor, resumed_optimizer.tensors()[key]), key

    # The state matters: without it the run goes elsewhere.
    fresh, fresh_optimizer = build(kind, muon)
    for name, parameter in fresh.items():
        parameter.data.copy_(weights[name])
    train(fresh, fresh_optimizer, range(3, 7))
    assert not torch.equal(fresh[TABLE], straight[TABLE])


def test_state_is_named_by_parameter_and_complete_before_the_first_step() -> None:
    parameters, optimizer = build("row_adam")
    tensors, scalars = optimizer.tensors(), optimizer.scalars()
    assert {key.rsplit("/", 1)[0] for key in tensors} == set(parameters)
    assert {key for key in tensors if key.startswith(TABLE)} == {
        f"{TABLE}/{state}" for state in ("first_moment", "second_moment", "row_step")
    }
    assert "blocks.1.ffn.experts.gate_up/momentum" in tensors
    assert scalars["embed.weight/step"] == 0
    train(parameters, optimizer, range(2))
    assert optimizer.tensors().keys() == tensors.keys()
    assert optimizer.scalars()["embed.weight/step"] == 2
    assert optimizer.scalars()["head.weight/step"] == 1


def test_missing_unexpected_and_misshapen_state_is_an_error_and_changes_nothing() -> None:
    parameters, optimizer = build()
    train(parameters, optimizer, range(1))
    before = snapshot(optimizer)
    changed = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    missing = {key: tensor for key, tensor in changed.items() if key != "embed.weight/first_moment"}
    with pytest.raises(OptimizerStateError, match=r"lacks embed\.weight/first_moment:"):
        optimizer.load_tensors(missing)
    with pytest.raises(OptimizerStateError, match=r"has an unexpected old\.weight/momentum"):
        optimizer.load_tensors(changed | {"old.weight/momentum": torch.zeros(2)})
    with pytest.raises(OptimizerStateError, match=r"head\.weight/second_moment is torch\.float32 \[2, 2\].*\[11, 6\]"):
        optimizer.load_tensors(changed | {"head.weight/second_moment": torch.zeros(2, 2)})
    with pytest.raises(OptimizerStateError, match=r"row_step is torch\.int64 \[31\].*torch\.int32 \[31\]"):
        optimizer.load_tensors(changed | {f"{TABLE}/row_step": torch.zeros(31, dtype=torch.int64)})
    with pytest.raises(OptimizerStateError, match=r"lacks .* and \d+ more"):
        optimizer.load_scalars({})
    assert all(torch.equal(tensor, before[key]) for key, tensor in optimizer.tensors().items())


def test_state_of_another_table_optimizer_is_refused() -> None:
    _, adam = build("row_adam")
    _, adagrad = build("rowwise_adagrad")
    with pytest.raises(OptimizerStateError, match=r"square_sum.*optim\.table\.kind"):
        adagrad.load_tensors(adam.tensors())


def test_dense_adam_refuses_tables_in_bfloat16() -> None:
    parameters = model_parameters(model_shapes(), torch.Generator().manual_seed(11))
    parameters[TABLE] = nn.Parameter(parameters[TABLE].detach().bfloat16())
    with pytest.raises(RoleError, match=rf"{TABLE} is stored in bfloat16, but optim\.table\.kind dense_adam"):
        build_optimizer(parameters.items(), OptimConfig(table=TableOptimConfig(kind="dense_adam")))


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_moves_every_role_at_its_rate(kind: str) -> None:
    parameters, optimizer = build(kind)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    set_gradients(parameters, torch.Generator().manual_seed(5))
    touched = gradient_of(parameters[TABLE])._indices()[0].unique()
    optimizer.step(0.01)
    moved = {name: (parameter.detach() - before[name]) for name, parameter in parameters.items()}
    torch.testing.assert_close(moved["norm.weight"].abs(), torch.full((6,), 0.01))
    muon_rms = moved["blocks.1.ffn.experts.gate_up"].square().mean().sqrt()
    assert 0.6 * 0.2 * 0.01 < muon_rms < 1.3 * 0.2 * 0.01
    table_rms = moved[TABLE][touched].square().mean().sqrt()
    torch.testing.assert_close(table_rms, torch.tensor(0.05 * (0.18 if kind == "sinkhorn" else 1.0)), rtol=1e-3, atol=0)
    assert moved[TABLE].count_nonzero(dim=1).nonzero()[:, 0].tolist() == touched.tolist()


def test_zero_grad_drops_gradients_and_a_step_without_any_does_nothing() -> None:
    parameters, optimizer = build()
    train(parameters, optimizer, range(1))
    assert all(parameter.grad is None for parameter in parameters.values())
    before, state = {name: parameter.clone() for name, parameter in parameters.items()}, snapshot(optimizer)
    optimizer.step(0.1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.tensors().items())


def test_groups_and_table_list_every_parameter_once() -> None:
    parameters, optimizer = build()
    assert [row.name for row in optimizer.groups] == list(parameters)
    assert [row.shape for row in optimizer.groups] == [parameter.shape for parameter in parameters.values()]
    assert "blocks.{0-1}.attn.kv_b_proj.weight" in optimizer.roles_table()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu_and_repeats_bitwise(kind: str) -> None:
    muon = MuonConfig(newton_schulz_dtype="float32")
    here, here_optimizer = build(kind, muon)
    train(here, here_optimizer, range(4))
    runs = []
    for _ in range(2):
        there, there_optimizer = build(kind, muon, device="cuda")
        train(there, there_optimizer, range(4), device="cuda")
        runs.append(there)
    for name, parameter in here.items():
        torch.testing.assert_close(runs[0][name].cpu(), parameter, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(runs[0][name], runs[1][name]), name
