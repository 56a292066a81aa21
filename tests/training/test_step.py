"""Gradients of one step against the loss over the whole batch, and what a skipped step leaves behind."""

from collections.abc import Callable

import pytest
import torch

from engram.config import Config
from engram.data.loader import Batch
from engram.model.transformer import IGNORE, Transformer
from engram.optim.optimizer import build_optimizer
from engram.training.step import (
    accumulate,
    apply_gradient,
    compute_gradient,
    discard_gradient,
    nonfinite_gradients,
)

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def model(make_config: MakeConfig) -> Transformer:
    return Transformer(make_config().model).train()


@pytest.fixture
def batch() -> Batch:
    """Rows of uneven numbers of targets, one without any."""
    tokens = torch.randint(0, 384, (6, 19))
    targets = torch.randint(0, 384, (6, 19))
    targets[0, 3:] = IGNORE
    targets[4] = IGNORE
    targets[5, ::2] = IGNORE
    return Batch(tokens, targets, (torch.arange(19) > 8).long().expand(6, -1))


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_any_split_of_the_batch_has_the_gradient_of_the_whole(
    model: Transformer, batch: Batch, micro_batch_size: int
) -> None:
    loss = model.loss(*batch)
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    split_loss = accumulate(model, batch, micro_batch_size, CPU)
    actual = gradients(model)
    assert split_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert actual.keys() == expected.keys()
    whole = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in expected.values()]))
    for name, gradient in actual.items():
        difference = (gradient - expected[name]).norm()
        assert difference < 1e-6 * whole, f"{name}: {difference / whole}"
        # Gradients of single numbers are sums in which almost everything cancels.
        assert difference < 1e-4 * expected[name].norm() + 1e-12, f"{name}: {difference / expected[name].norm()}"


def test_a_batch_without_targets_has_loss_and_gradient_zero(model: Transformer, batch: Batch) -> None:
    empty = batch._replace(targets=torch.full_like(batch.targets, IGNORE))
    gradient = compute_gradient(model, empty, 2, 1.0, CPU)
    assert (gradient.loss, gradient.norm, gradient.finite) == (0.0, 0.0, True)


def test_the_norm_is_that_before_clipping(model: Transformer, batch: Batch) -> None:
    gradient = compute_gradient(model, batch, 6, 0.01, CPU)
    clipped = torch.linalg.vector_norm(torch.stack([each.norm() for each in gradients(model).values()]))
    assert clipped.item() == pytest.approx(0.01, rel=1e-4)
    model.zero_grad()
    accumulate(model, batch, 6, CPU)
    whole = torch.linalg.vector_norm(torch.stack([each.norm() for each in gradients(model).values()]))
    assert gradient.norm == pytest.approx(whole.item(), rel=1e-5)
    assert gradient.loss == pytest.approx(model.eval().loss(*batch).item(), rel=1e-6)


def test_a_step_moves_weights_and_router_bias_and_clears_up(
    make_config: MakeConfig, model: Transformer, batch: Batch
) -> None:
    optimizer = build_optimizer(model.named_parameters(), make_config().optim)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compute_gradient(model, batch, 3, 1.0, CPU)
    router = model.blocks[1].ffn.router
    # Every token of both micro-batches was counted, top-2 each.
    assert router.load.sum() == 2 * batch.tokens.numel()
    apply_gradient(model, optimizer, 0.01)
    after = model.state_dict()
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert set((after["blocks.1.ffn.router.bias"]).abs().tolist()) <= {0.0, torch.tensor(0.001).item()}
    assert after["blocks.1.ffn.router.bias"].any()
    assert router.load.sum() == 0 and not gradients(model)


def test_a_discarded_step_leaves_no_trace(make_config: MakeConfig, model: Transformer, batch: Batch) -> None:
    optimizer = build_optimizer(model.named_parameters(), make_config().optim)
    before = {name: tensor.clone() for name, tensor in {**model.state_dict(), **optimizer.tensors()}.items()}
    with torch.no_grad():
        weight = model.head.weight[7, 3].item()
        model.head.weight[7, 3] = torch.inf
    gradient = compute_gradient(model, batch, 2, 1.0, CPU)
    assert not gradient.finite
    assert "head.weight" in nonfinite_gradients(model)
    discard_gradient(model, optimizer)
    with torch.no_grad():
        model.head.weight[7, 3] = weight
    after = {**model.state_dict(), **optimizer.tensors()}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not gradients(model)


def test_nonfinite_gradients_are_found_in_tables_too(model: Transformer, batch: Batch) -> None:
    accumulate(model, batch, 6, CPU)
    assert nonfinite_gradients(model) == []
    model.blocks[1].memory.embed.weight.grad._values()[4, 2] = torch.nan
    assert nonfinite_gradients(model) == ["blocks.1.memory.embed.weight"]
