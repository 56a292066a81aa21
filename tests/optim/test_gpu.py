"""Every optimizer on a GPU against the CPU, at sizes that fill more than a block of threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engram.config import MuonConfig, TableOptimConfig
from engram.memory.table import RowTable
from engram.optim.adamw import AdamW
from engram.optim.clip import clip_grad_norm
from engram.optim.groups import Assignment
from engram.optim.muon import Muon
from engram.optim.role import Role
from engram.optim.row_adam import RowAdam
from engram.optim.rowwise_adagrad import RowwiseAdagrad
from engram.optim.sinkhorn import SinkhornMomentum

from .helpers import assign, random_sparse_gradient

pytestmark = pytest.mark.gpu

BETAS, EPS, STEPS, LR = (0.9, 0.95), 1e-10, 5, 0.01
ROWS, WIDTH, READS = 10_007, 24, 6_001
Build = Callable[[list[Assignment]], Role]
TABLES: dict[str, Build] = {
    "row_adam": lambda rows: RowAdam(rows, BETAS, EPS),
    "rowwise_adagrad": lambda rows: RowwiseAdagrad(rows, EPS),
    "sinkhorn": lambda rows: SinkhornMomentum(rows, TableOptimConfig(kind="sinkhorn")),
    "dense_adam": lambda rows: AdamW(rows, BETAS, EPS),
}
HIDDEN = {"tall": (130, 33), "wide": (33, 130), "experts": (3, 2, 65, 33), "wkv": (5 * 33, 20)}


def moved(
    starts: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    build: Build,
    device: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far each parameter goes in some steps, and the optimizer's state after them; on the CPU again."""
    rows = [
        assign(name, start.to(device), lr_multiplier=1.0 + index, weight_decay=0.1 * index)
        for index, (name, start) in enumerate(starts.items())
    ]
    role = build(rows)
    for step, gradient in enumerate(gradients):
        for row in rows:
            # One parameter misses a step: its own count of steps then lags behind.
            row.parameter.grad = None if (step, row.name) == (1, "gain") else gradient[row.name].to(device)
        role.step(LR)
    weights = {row.name: row.parameter.detach().cpu() - starts[row.name] for row in rows}
    return weights, {key: tensor.cpu() for key, tensor in role.tensors.items()}


def assert_same(there: dict[str, Tensor], here: dict[str, Tensor], tolerance: float) -> None:
    assert there.keys() == here.keys()
    for name, expected in here.items():
        error = (there[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind: str, generator: torch.Generator) -> None:
    starts = {name: torch.randn(ROWS, WIDTH, generator=generator) for name in ("first", "second")}
    gradients = [{name: random_sparse_gradient(ROWS, WIDTH, READS, generator) for name in starts} for _ in range(STEPS)]
    here, there = (moved(starts, gradients, TABLES[kind], device) for device in ("cpu", "cuda"))
    for on_cuda, on_cpu in zip(there, here, strict=True):
        assert_same(on_cuda, on_cpu, 1e-4)


@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad"])
def test_dead_reads_touch_no_row(kind: str) -> None:
    table = RowTable(ROWS, 32, init_std=1.0).cuda()
    role = TABLES[kind]([Assignment("table", table.weight, "table", 1.0, 0.1)])

    def step(ids: list[list[int]]) -> list[int]:
        """Which rows a step moves whose tokens read `ids`."""
        before = {"weight": table.weight.detach().clone(), **{key: each.clone() for key, each in role.tensors.items()}}
        table.weight.grad = None
        table(torch.tensor([ids], device="cuda"), torch.float32).sum().backward()
        clip_grad_norm([table.weight], 1e-3)
        role.step(LR)
        after = {"weight": table.weight.detach(), **role.tensors}
        changed = [(after[key] != before[key]).view(ROWS, -1).any(1) for key in before]
        return torch.stack(changed).any(0).nonzero().flatten().tolist()

    # From here on, these rows have momentum.
    assert step([[0, 1], [2, ROWS - 1]]) == [0, 1, 2, ROWS - 1]
    assert step([[-1]]) == step([[-1, -1], [-1, -1]]) == []
    assert step([[-1, 2], [-1, -1]]) == [2]


def test_adamw(generator: torch.Generator) -> None:
    starts = {"matrix": torch.randn(301, 65, generator=generator), "gain": torch.randn(1001, generator=generator)}
    gradients = [
        {name: torch.randn(start.shape, generator=generator) for name, start in starts.items()} for _ in range(STEPS)
    ]
    here, there = (moved(starts, gradients, lambda rows: AdamW(rows, BETAS, EPS), device) for device in ("cpu", "cuda"))
    for on_cuda, on_cpu in zip(there, here, strict=True):
        assert_same(on_cuda, on_cpu, 1e-4)


# bfloat16 rounds to 2^-8, and Newton-Schulz multiplies such errors in small singular values.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_muon(dtype: str, tolerance: float, generator: torch.Generator) -> None:
    starts = {name: torch.randn(shape, generator=generator) for name, shape in HIDDEN.items()}
    gradients = [
        {name: torch.randn(start.shape, generator=generator) for name, start in starts.items()} for _ in range(STEPS)
    ]
    settings = MuonConfig(newton_schulz_dtype=dtype)
    here, there = (moved(starts, gradients, lambda rows: Muon(rows, settings), device) for device in ("cpu", "cuda"))
    assert_same(there[0], here[0], tolerance)
    assert_same(there[1], here[1], 1e-5)


@pytest.mark.parametrize("build", [lambda rows: AdamW(rows, BETAS, EPS), lambda rows: Muon(rows, MuonConfig())])
def test_a_step_never_waits_for_the_device(build: Build, generator: torch.Generator) -> None:
    rows = [assign(name, torch.randn(shape, generator=generator).cuda()) for name, shape in HIDDEN.items()]
    role = build(rows)
    for row in rows:
        row.parameter.grad = torch.ones_like(row.parameter)
    role.step(LR)
    torch.cuda.set_sync_debug_mode("error")
    try:
        role.step(LR)
    finally:
        torch.cuda.set_sync_debug_mode("default")
