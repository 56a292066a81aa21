import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from engram.config import MuonConfig
from engram.optim import muon
from engram.optim.groups import Assignment
from engram.optim.muon import Muon, newton_schulz

from .helpers import assign

FLOAT32 = MuonConfig(newton_schulz_dtype="float32")
# Tall, wide, square, dense gate_up [2, F, D], experts [E, 2, F, D] and [E, D, F]; several share a shape when made wide.
SHAPES = [(17, 5), (5, 17), (9, 9), (2, 17, 5), (3, 2, 17, 5), (3, 5, 17)]


def reference_step(weight: Tensor, momentum: Tensor, gradient: Tensor, lr: float, decay: float, s: MuonConfig) -> None:
    """One matrix at a time, in float64, by the definition."""
    for index in range(weight.shape[0]):
        momentum[index] = s.momentum * momentum[index] + (1 - s.momentum) * gradient[index]
        direction = momentum[index]
        if s.nesterov:
            direction = s.momentum * momentum[index] + (1 - s.momentum) * gradient[index]
        x = direction / (math.sqrt(float((direction**2).sum())) + 1e-7)
        for _ in range(s.newton_schulz_steps):
            # The quintic acts on singular values alone.
            u, singular, vh = torch.linalg.svd(x, full_matrices=False)
            x = u @ torch.diag(3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5) @ vh
        rows, columns = x.shape
        weight[index] = weight[index] * (1 - lr * decay) - lr * s.update_rms * math.sqrt(max(rows, columns)) * x


def reference_run(start: Tensor, gradients: list[Tensor], lr: float, decay: float, settings: MuonConfig) -> Tensor:
    weight = start.double().reshape(-1, *start.shape[-2:]).clone()
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        reference_step(weight, momentum, gradient.double().reshape(weight.shape), lr, decay, settings)
    return weight.reshape(start.shape)


def run(rows: list[Assignment], gradients: list[list[Tensor]], lr: float, settings: MuonConfig) -> None:
    role = Muon(rows, settings)
    for step_gradients in gradients:
        for row, gradient in zip(rows, step_gradients, strict=True):
            row.parameter.grad = gradient.clone()
        role.step(lr)


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_reference_of_each_matrix(nesterov: bool, generator: torch.Generator) -> None:
    settings = FLOAT32.replace(nesterov=nesterov, momentum=0.8)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    decays = [0.1, 0.0, 0.1, 0.2, 0.1, 0.0]
    rows = [
        assign(str(index), start, "muon", weight_decay=decay)
        for index, (start, decay) in enumerate(zip(starts, decays, strict=True))
    ]
    run(rows, gradients, 0.1, settings)
    for index, row in enumerate(rows):
        expected = reference_run(starts[index], [g[index] for g in gradients], 0.1, decays[index], settings)
        torch.testing.assert_close(row.parameter.double(), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_equals_torch_muon(generator: torch.Generator) -> None:
    start = torch.randn(48, 33, generator=generator)
    row, theirs = assign("w", start, "muon", weight_decay=0.1), nn.Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    role = Muon([row], MuonConfig())
    for _ in range(4):
        row.parameter.grad = torch.randn(start.shape, generator=generator)
        theirs.grad = row.parameter.grad.clone()
        role.step(0.01)
        reference.step()
    moved = (theirs - start).norm()
    assert (row.parameter - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_land_in_the_band(dtype: torch.dtype, generator: torch.Generator) -> None:
    stack = torch.randn(4, 24, 40, generator=generator) * torch.tensor([1e-4, 1.0, 30.0, 1e3])[:, None, None]
    before = torch.linalg.svdvals(stack)
    assert (before[:, 0] / before[:, -1]).min() > 3
    after = torch.linalg.svdvals(newton_schulz(stack.to(dtype), steps=5).float())
    assert after.min() > 0.65
    assert after.max() < 1.25


def test_zero_matrices_stay_zero_beside_others(generator: torch.Generator) -> None:
    stack = torch.randn(3, 4, 6, generator=generator)
    stack[1] = 0
    result = newton_schulz(stack, steps=5)
    assert torch.equal(result[1], torch.zeros(4, 6))
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (2, 48, 64)])
def test_update_rms_is_as_configured(shape: tuple[int, ...], generator: torch.Generator) -> None:
    row = assign("w", torch.zeros(shape), "muon")
    run([row], [[torch.randn(shape, generator=generator)]], 0.5, MuonConfig(update_rms=0.18))
    rms = row.parameter.square().mean().sqrt().item()
    # Singular values between 0.7 and 1.2 put the root mean square between 0.7 and 1.2 of the nominal one.
    assert 0.7 * 0.5 * 0.18 < rms < 1.2 * 0.5 * 0.18


def test_experts_together_equal_each_on_its_own(generator: torch.Generator) -> None:
    start = torch.randn(3, 2, 10, 6, generator=generator)
    gradients = [torch.randn(start.shape, generator=generator) * 10.0**scale for scale in (0, -3)]
    together = assign("experts", start, "muon")
    run([together], [[gradient] for gradient in gradients], 0.1, FLOAT32)
    for expert in range(3):
        for half in range(2):
            alone = assign("expert", start[expert, half], "muon")
            run([alone], [[gradient[expert, half]] for gradient in gradients], 0.1, FLOAT32)
            torch.testing.assert_close(together.parameter[expert, half], alone.parameter, rtol=1e-5, atol=1e-5)
    # Orthogonalising gate and up as one matrix gives something else.
    fused = assign("fused", start.flatten(1, 2), "muon")
    run([fused], [[gradient.flatten(1, 2)] for gradient in gradients], 0.1, FLOAT32)
    assert (fused.parameter.view_as(start) - together.parameter).abs().max() > 1e-2


def test_transposed_matrix_moves_by_the_transposed_update(generator: torch.Generator) -> None:
    start, gradient = torch.randn(19, 8, generator=generator), torch.randn(19, 8, generator=generator)
    tall, wide = assign("tall", start, "muon"), assign("wide", start.T.contiguous(), "muon")
    run([tall], [[gradient]], 0.1, FLOAT32)
    run([wide], [[gradient.T]], 0.1, FLOAT32)
    assert torch.equal(tall.parameter, wide.parameter.T)


def test_bounded_stacks_give_the_same_update(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES]]
    results = []
    # 2 matrices of 5 x 17 fit into 200 elements; into 50 not even one, which is then a stack of its own.
    for limit in (2**26, 200, 50):
        monkeypatch.setattr(muon, "STACK_ELEMENTS", limit)
        rows = [assign(str(index), start, "muon") for index, start in enumerate(starts)]
        run(rows, gradients, 0.1, FLOAT32)
        results.append([row.parameter.detach() for row in rows])
    for result in results[1:]:
        for whole, split in zip(results[0], result, strict=True):
            torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_missing_gradient_leaves_weight_and_momentum_alone(generator: torch.Generator) -> None:
    rows = [assign(name, torch.randn(4, 6, generator=generator), "muon", weight_decay=0.1) for name in ("here", "gone")]
    role = Muon(rows, FLOAT32)
    for row in rows:
        row.parameter.grad = torch.randn(4, 6, generator=generator)
    role.step(0.1)
    rows[1].parameter.grad = None
    here, gone, momentum = *(row.parameter.clone() for row in rows), role.tensors["gone/momentum"].clone()
    role.step(0.1)
    assert torch.equal(rows[1].parameter, gone)
    assert torch.equal(role.tensors["gone/momentum"], momentum)
    assert not torch.equal(rows[0].parameter, here)
    rows[0].parameter.grad = None
    role.step(0.1)


def test_matrices_below_one_another_move_each_on_its_own(generator: torch.Generator) -> None:
    """Keys and value of the memory: three tall matrices in one parameter, the last with by far the largest gradient."""
    start = torch.randn(3 * 17, 5, generator=generator)
    gradients = [torch.randn(start.shape, generator=generator) for _ in range(2)]
    for gradient in gradients:
        gradient[34:] *= 100
    stacked = dataclasses.replace(assign("wkv", start, "muon", weight_decay=0.1), matrices=3)
    run([stacked], [[gradient] for gradient in gradients], 0.1, FLOAT32)
    for rows in torch.arange(51).split(17):
        alone = assign("key", start[rows], "muon", weight_decay=0.1)
        run([alone], [[gradient[rows]] for gradient in gradients], 0.1, FLOAT32)
        torch.testing.assert_close(stacked.parameter[rows], alone.parameter, rtol=1e-5, atol=1e-6)
    # As one matrix the keys would hardly move.
    fused = assign("wkv", start, "muon", weight_decay=0.1)
    run([fused], [[gradient] for gradient in gradients], 0.1, FLOAT32)
    moved = [(each.parameter[:34] - start[:34] * 0.99**2).norm() for each in (fused, stacked)]
    assert moved[0] < 0.1 * moved[1]
