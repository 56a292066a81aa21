import math

import pytest
import torch
from torch import Tensor

from engram.config import TableOptimConfig
from engram.optim.sinkhorn import SinkhornMomentum

from .helpers import assign, random_sparse_gradient, sparse_gradient

SETTINGS = TableOptimConfig(kind="sinkhorn")
ROWS, WIDTH = 19, 6


def reference_balanced(lookahead: Tensor, steps: int, threshold: float) -> tuple[Tensor, list[int]]:
    """The update by the letter, in float64: rewrite the matrix at every step, row by row and column by column."""
    balanced = lookahead.double().clone()
    norms = [math.sqrt(float((line**2).sum())) for line in balanced]
    active = [index for index, norm in enumerate(norms) if norm > threshold * sum(norms) / len(norms)]
    for index in range(len(balanced)):
        if index not in active:
            balanced[index] = 0
    for step in range(1, steps + 1):
        if step % 2:
            for index in active:
                balanced[index] /= math.sqrt(float((balanced[index] ** 2).sum())) + 1e-20
        else:
            for column in range(balanced.shape[1]):
                balanced[:, column] /= math.sqrt(float((balanced[:, column] ** 2).sum())) + 1e-20
    return balanced, active


def test_equals_reference_for_six_steps(generator: torch.Generator) -> None:
    lr, decay, beta = 0.01, 0.1, SETTINGS.momentum
    row = assign("table", torch.randn(ROWS, WIDTH, generator=generator), "table", lr_multiplier=5.0, weight_decay=decay)
    weight, momentum = row.parameter.detach().double(), torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    role = SinkhornMomentum([row], SETTINGS)
    for _ in range(6):
        row.parameter.grad = random_sparse_gradient(ROWS, WIDTH, 7, generator)
        dense = row.parameter.grad.to_dense().double()
        momentum = beta * momentum + (1 - beta) * dense
        lookahead = beta * momentum + (1 - beta) * dense
        balanced, active = reference_balanced(lookahead, SETTINGS.sinkhorn_steps, SETTINGS.inactive_row_threshold)
        weight[active] *= 1 - 5 * lr * decay
        weight -= 5 * lr * 0.18 * math.sqrt(WIDTH) * balanced
        role.step(lr)
    torch.testing.assert_close(row.parameter.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(role.tensors["table/momentum"].double(), momentum, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e24])
def test_updated_rows_move_by_the_configured_rms(scale: float, generator: torch.Generator) -> None:
    row = assign("table", torch.zeros(ROWS, WIDTH), "table")
    touched = torch.tensor([1, 4, 5, 9, 12, 13, 17, 18])
    gradient = torch.randn(8, WIDTH, generator=generator) * scale
    row.parameter.grad = sparse_gradient(touched, gradient, ROWS)
    SinkhornMomentum([row], SETTINGS).step(0.5)
    rms = row.parameter.detach().square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms[touched], torch.full((8,), 0.5 * 0.18), rtol=1e-5, atol=0.0)
    assert rms.count_nonzero() == 8
    assert torch.equal(row.parameter[touched].sign(), -gradient.sign())


def test_inactive_rows_and_columns_of_zeros_do_not_move(generator: torch.Generator) -> None:
    start, gradient = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
    gradient[:, 2] = 0
    # Norms of sqrt(5) on average: row 3 lies below a thousandth of the mean, row 6 above, row 8 is zero.
    gradient[3], gradient[6], gradient[8] = gradient[3] * 1e-4, gradient[6] * 1e-2, 0
    row = assign("table", start, "table", weight_decay=0.1)
    row.parameter.grad = sparse_gradient(torch.arange(ROWS), gradient, ROWS)
    role = SinkhornMomentum([row], SETTINGS)
    role.step(0.5)
    resting = (row.parameter == start).all(dim=1).nonzero()[:, 0]
    assert resting.tolist() == [3, 8]
    # Only weight decay moves a column without gradients.
    active = torch.tensor([index for index in range(ROWS) if index not in (3, 8)])
    torch.testing.assert_close(row.parameter[active, 2], start[active, 2] * (1 - 0.5 * 0.1))
    # The momentum of inactive rows is kept.
    assert role.tensors["table/momentum"][3].count_nonzero() == WIDTH - 1


def test_momentum_keeps_moving_rows_that_are_not_read(generator: torch.Generator) -> None:
    row = assign("table", torch.zeros(ROWS, WIDTH), "table")
    role = SinkhornMomentum([row], SETTINGS)
    row.parameter.grad = sparse_gradient(torch.tensor([2]), torch.randn(1, WIDTH, generator=generator), ROWS)
    role.step(0.1)
    after_first = row.parameter.detach().clone()
    row.parameter.grad = sparse_gradient(torch.tensor([5]), torch.randn(1, WIDTH, generator=generator), ROWS)
    role.step(0.1)
    moved = (row.parameter != after_first).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == [2, 5]
    row.parameter.grad = None
    before = row.parameter.detach().clone()
    role.step(0.1)
    assert torch.equal(row.parameter, before)
