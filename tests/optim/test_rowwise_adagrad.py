import math

import torch

from engram.optim.rowwise_adagrad import RowwiseAdagrad

from .helpers import assign, random_sparse_gradient


def test_equals_a_python_loop(generator: torch.Generator) -> None:
    rows, width, lr, decay, eps = 17, 3, 0.05, 0.1, 1e-10
    row = assign("table", torch.randn(rows, width, generator=generator), "table", lr_multiplier=2.0, weight_decay=decay)
    weight, sums = row.parameter.tolist(), [0.0] * rows
    role = RowwiseAdagrad([row], eps)
    assert role.tensors["table/square_sum"].shape == (rows,)
    for _ in range(6):
        row.parameter.grad = random_sparse_gradient(rows, width, 9, generator)
        gradient = row.parameter.grad.to_dense().tolist()
        for index in sorted(set(row.parameter.grad._indices()[0].tolist())):
            sums[index] += sum(g * g for g in gradient[index]) / width
            for column in range(width):
                step = 2 * lr * gradient[index][column] / (math.sqrt(sums[index]) + eps)
                weight[index][column] = weight[index][column] * (1 - 2 * lr * decay) - step
        role.step(lr)
    torch.testing.assert_close(row.parameter.detach(), torch.tensor(weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(role.tensors["table/square_sum"], torch.tensor(sums), rtol=1e-5, atol=1e-6)
    assert 0.0 in sums


def test_missing_gradient_changes_nothing(generator: torch.Generator) -> None:
    start = torch.randn(4, 3, generator=generator)
    row = assign("table", start, "table", weight_decay=0.1)
    RowwiseAdagrad([row], 1e-10).step(0.1)
    assert torch.equal(row.parameter, start)
