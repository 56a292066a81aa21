import pytest
import torch

from engram.kernels import linear_cross_entropy as module
from engram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref


@pytest.mark.parametrize("chunk_logits", [37, 37 * 5, 2**24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    x, weight = torch.randn(23, 17).to(dtype), torch.randn(37, 17)
    targets = torch.randint(0, 37, (23,))
    targets[[0, 5, 22]] = -100
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_ref):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        losses = function(*leaves, targets)
        results.append((losses, *torch.autograd.grad(losses, leaves, torch.linspace(-1, 2, 23))))
    assert (results[0][0][[0, 5, 22]] == 0).all()
    for name, got, want in zip(("losses", "x", "weight"), *results, strict=True):
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_extreme_logits() -> None:
    x, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    losses = linear_cross_entropy(x, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 2000.0]))


def test_all_targets_ignored() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    losses = linear_cross_entropy(x, torch.randn(5, 3), torch.full((4,), -100))
    losses.sum().backward()
    assert (losses == 0).all() and (x.grad == 0).all()
