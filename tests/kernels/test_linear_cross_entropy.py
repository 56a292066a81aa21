import functools

import pytest
import torch

from engram.kernels import linear_cross_entropy as module
from engram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref, token_cross_entropy


# One size compiles: each would take seconds.
@pytest.mark.parametrize(("chunk_logits", "compiled"), [(37, False), (37 * 5, False), (2**24, False), (37 * 5, True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    linear_cross_entropy = functools.partial(module.linear_cross_entropy, compiled=compiled)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    x, weight = torch.randn(23, 17).to(dtype), torch.randn(37, 17)
    targets = torch.randint(0, 37, (23,))
    targets[[0, 5, 22]] = -100
    results = []
    for function in (linear_cross_entropy, lambda *inputs: linear_cross_entropy_ref(*inputs).sum()):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves, targets)
        results.append((loss, *torch.autograd.grad(loss / 4067, leaves)))
    for name, got, want in zip(("loss", "x", "weight"), *results, strict=True):
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("chunk_logits", [37, 37 * 5, 2**24])
def test_losses_of_single_tokens(monkeypatch: pytest.MonkeyPatch, chunk_logits: int) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    x, weight, targets = torch.randn(23, 17), torch.randn(37, 17), torch.randint(0, 37, (23,))
    targets[[3, 4]] = -100
    losses = token_cross_entropy(x, weight, targets)
    torch.testing.assert_close(losses, linear_cross_entropy_ref(x, weight, targets))
    assert (losses[[3, 4]] == 0).all()
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), losses.sum())


def test_extreme_logits() -> None:
    x, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    torch.testing.assert_close(token_cross_entropy(x, weight, torch.tensor([0, 0])), torch.tensor([0.0, 2000.0]))
    loss = linear_cross_entropy(x.requires_grad_(), weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2000.0
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [-2.0]]))


def test_all_targets_ignored() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(5, 3), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_the_loss_scales_all_gradients_alike() -> None:
    """1 / 4067 is no bfloat16 number: rounding it would scale the backbone's gradient but not the head's."""
    x, weight = torch.randn(4000, 17).bfloat16().requires_grad_(), torch.randn(37, 17)
    targets = torch.randint(0, 37, (4000,))
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)[0].float()
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, targets) / 4067, x)[0].float()
    ratio = (scaled * 4067 * whole).sum() / whole.square().sum()
    assert abs(ratio.item() - 1) < 4e-4


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64)).grad_fn is None
