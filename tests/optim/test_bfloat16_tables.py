"""Tables stored in bfloat16: stochastic rounding, state in float32, and bits that a resumed run repeats."""

import pytest
import torch

from engram.config import TableOptimConfig
from engram.optim.groups import Assignment
from engram.optim.role import TableRole
from engram.optim.row_adam import RowAdam
from engram.optim.rowwise_adagrad import RowwiseAdagrad
from engram.optim.sinkhorn import SinkhornMomentum

from .helpers import assign, random_sparse_gradient, sparse_gradient

ROWS, WIDTH = 23, 16
KINDS = ("row_adam", "rowwise_adagrad", "sinkhorn")


def build(kind: str, table: torch.Tensor, name: str = "table") -> tuple[Assignment, TableRole]:
    row = assign(name, table, "table")
    match kind:
        case "row_adam":
            return row, RowAdam([row], (0.9, 0.95), 1e-10)
        case "rowwise_adagrad":
            return row, RowwiseAdagrad([row], 1e-10)
    return row, SinkhornMomentum([row], TableOptimConfig(kind="sinkhorn"))


def train(row: Assignment, role: TableRole, steps: range, lr: float = 1e-3) -> None:
    for step in steps:
        row.parameter.grad = random_sparse_gradient(ROWS, WIDTH, 40, torch.Generator().manual_seed(step))
        role.step(lr)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_float32_and_counts_updates(kind: str) -> None:
    row, role = build(kind, torch.randn(ROWS, WIDTH).bfloat16())
    assert role.counts == {"table/step": 0}
    train(row, role, range(3))
    assert role.counts == {"table/step": 3}
    assert row.parameter.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in role.tensors.values()} <= {torch.float32, torch.int32}
    # Tables in float32 are rounded by nobody, and need no count.
    assert build(kind, torch.randn(ROWS, WIDTH))[1].counts == {}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_far_below_the_spacing_of_bfloat16_add_up(kind: str) -> None:
    """Weights of 1 lie 2^-8 apart: 400 steps of 2^-8 / 80 would all be lost if they were rounded to the nearest."""
    plain, plain_role = build(kind, torch.ones(ROWS, WIDTH))
    coarse, coarse_role = build(kind, torch.ones(ROWS, WIDTH).bfloat16())
    gradient = sparse_gradient(torch.arange(ROWS), torch.ones(ROWS, WIDTH), ROWS)
    # Row-wise Adagrad's steps shrink as 1 / sqrt(steps): here for steps of about the same size.
    lr = {"row_adam": 1.0, "rowwise_adagrad": 10.0, "sinkhorn": 1 / 0.18}[kind] * 2**-8 / 80
    for _ in range(400):
        for row, role in ((plain, plain_role), (coarse, coarse_role)):
            row.parameter.grad = gradient
            role.step(lr)
    expected = (1 - plain.parameter).mean()
    assert expected > 0.01
    torch.testing.assert_close((1 - coarse.parameter.float()).mean(), expected, rtol=0.05, atol=0.0)
    assert coarse.parameter.unique().numel() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_repeats_the_bits_and_the_step_decides_them(kind: str) -> None:
    start = torch.randn(ROWS, WIDTH).bfloat16()
    straight, straight_role = build(kind, start)
    train(straight, straight_role, range(5))
    first, first_role = build(kind, start)
    train(first, first_role, range(2))
    for count in (first_role.counts["table/step"], 0):
        resumed, resumed_role = build(kind, first.parameter.detach())
        for key, tensor in resumed_role.tensors.items():
            tensor.copy_(first_role.tensors[key])
        resumed_role.counts["table/step"] = count
        train(resumed, resumed_role, range(2, 5))
        assert torch.equal(resumed.parameter, straight.parameter) == (count == 2)


def test_tables_round_independently(generator: torch.Generator) -> None:
    start = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    moved = []
    for name in ("first", "second"):
        row, role = build("row_adam", start, name)
        train(row, role, range(1))
        moved.append(row.parameter.detach())
    assert not torch.equal(*moved)


def test_gradients_of_bfloat16_tables_stay_float32() -> None:
    row, _ = build("row_adam", torch.zeros(ROWS, WIDTH).bfloat16())
    torch.nn.functional.embedding(torch.tensor([3]), row.parameter).float().sum().backward()
    assert row.parameter.grad is not None
    assert row.parameter.grad.dtype == torch.float32
