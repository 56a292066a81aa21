import math
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from engram.config import TableOptimConfig
from engram.optim import sparse
from engram.optim.clip import clip_grad_norm
from engram.optim.role import TableRole
from engram.optim.row_adam import RowAdam
from engram.optim.rowwise_adagrad import RowwiseAdagrad
from engram.optim.sinkhorn import SinkhornMomentum

from .helpers import assign, gradient_of, random_sparse_gradient, sparse_gradient


def gradients(generator: torch.Generator, dense: bool) -> list[nn.Parameter]:
    """The same gradients, with the table's repeated rows as sparse COO or added up in a dense tensor."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(7, 5), (13,), (9, 4), (3,)]]
    parameters[0].grad = torch.randn(7, 5, generator=generator)
    parameters[1].grad = torch.randn(13, generator=generator)
    table = random_sparse_gradient(9, 4, 30, generator)
    parameters[2].grad = table.to_dense() if dense else table
    return parameters


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_equals_dense_clipping_with_duplicate_rows_counted_once(max_norm: float | None) -> None:
    ours = gradients(torch.Generator().manual_seed(3), dense=False)
    theirs = gradients(torch.Generator().manual_seed(3), dense=True)
    reads = gradient_of(ours[2])._values()
    naive = math.sqrt(sum(float(each.square().sum()) for each in (gradient_of(ours[0]), gradient_of(ours[1]), reads)))
    norm = clip_grad_norm(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
    torch.testing.assert_close(norm, expected)
    assert abs(naive - float(norm)) > 0.1
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(gradient_of(mine).to_dense(), other.grad, rtol=1e-5, atol=1e-6)
    assert gradient_of(ours[2]).is_coalesced()
    assert ours[3].grad is None
    torch.testing.assert_close(clip_grad_norm(ours, None), torch.tensor(min(float(expected), max_norm or math.inf)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_norm_is_returned_and_scales_nothing(bad: float) -> None:
    parameters = gradients(torch.Generator().manual_seed(4), dense=False)
    gradient_of(parameters[1])[2] = bad
    before = gradient_of(parameters[0]).clone()
    assert not math.isfinite(float(clip_grad_norm(parameters, 1.0)))
    assert torch.equal(gradient_of(parameters[0]), before)


def test_no_gradients_have_norm_zero() -> None:
    assert float(clip_grad_norm([nn.Parameter(torch.ones(3))], 1.0)) == 0.0
    empty = nn.Parameter(torch.ones(4, 2))
    empty.grad = sparse_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, 2), 4)
    assert float(clip_grad_norm([empty], 1.0)) == 0.0


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn"])
def test_rows_are_summed_once_and_the_update_takes_the_sums(
    kind: str, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = assign("table", torch.ones(9, 4), "table")
    role: TableRole = {
        "row_adam": lambda: RowAdam([row], (0.9, 0.95), 1e-10),
        "rowwise_adagrad": lambda: RowwiseAdagrad([row], 1e-10),
        "sinkhorn": lambda: SinkhornMomentum([row], TableOptimConfig(kind="sinkhorn")),
    }[kind]()
    planned, moved = Mock(wraps=sparse.plan_rows), Mock(wraps=role.update)
    monkeypatch.setattr(sparse, "plan_rows", planned)
    monkeypatch.setattr(role, "update", moved)
    row.parameter.grad = random_sparse_gradient(9, 4, 30, torch.Generator().manual_seed(5))
    if clipped:
        clip_grad_norm([row.parameter], 0.1)
    role.step(0.01)
    planned.assert_called_once()
    moved.assert_called_once()
    assert moved.call_args.args[1].is_coalesced()
