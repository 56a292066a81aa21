"""Products of bfloat16 where the processor lacks them: the same numbers, from float32."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels import products
from engram.kernels.causal_attention import causal_attention
from engram.kernels.linear_cross_entropy import linear_cross_entropy
from engram.kernels.moe_experts import moe_experts
from engram.kernels.products import add_product, linear, needs_widening, product, product_into, widened
from engram.optim.muon import newton_schulz


@pytest.fixture(params=[True, False], ids=["widened", "as they are"])
def lacks_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(products, "_cpu_lacks_bfloat16", lambda: request.param)
    yield request.param


def rounded(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def test_what_is_widened(lacks_bfloat16: bool) -> None:
    assert needs_widening("cpu", torch.bfloat16) is lacks_bfloat16
    assert not needs_widening("cpu", torch.float32) and not needs_widening("cuda", torch.bfloat16)
    a, b = rounded(2, 3), torch.randn(3)
    assert [each.dtype for each in widened(a, a)] == [torch.float32 if lacks_bfloat16 else torch.bfloat16] * 2
    assert widened(b)[0] is b


@pytest.mark.usefixtures("lacks_bfloat16")
def test_a_product_is_that_of_float32_rounded_once() -> None:
    x, weight, bias = rounded(5, 96), rounded(7, 96), rounded(7)
    wanted = x.float() @ weight.float().t()
    torch.testing.assert_close(linear(x, weight), wanted.bfloat16(), rtol=2**-7, atol=0)
    torch.testing.assert_close(linear(x, weight, bias), (wanted + bias).bfloat16(), rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(product(x, weight.t()), wanted.bfloat16(), rtol=2**-7, atol=0)
    out = rounded(5, 7)
    product_into(out, x, weight.t())
    torch.testing.assert_close(out, wanted.bfloat16(), rtol=2**-7, atol=0)
    total, a, b = rounded(2, 5, 7), rounded(2, 5, 96), rounded(2, 96, 7)
    wanted = 3 * total.float() - 2 * a.float() @ b.float()
    torch.testing.assert_close(add_product(total, a, b, beta=3, alpha=-2), wanted.bfloat16(), rtol=2**-7, atol=2**-7)


def test_widened_products_give_exactly_the_rounded_ones_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_lacks_bfloat16", lambda: True)
    x, weight = rounded(40, 96), rounded(64, 96)
    assert torch.equal(linear(x, weight), F.linear(x.float(), weight.float()).bfloat16())


def test_gradients_keep_the_dtype_of_their_operands(lacks_bfloat16: bool) -> None:
    x, weight = rounded(6, 32).requires_grad_(), torch.randn(16, 32, requires_grad=True)
    linear(x, weight.to(x.dtype)).square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    out = (x.detach().float() @ weight.detach().bfloat16().float().t()).bfloat16().float()
    torch.testing.assert_close(weight.grad, 2 * out.t() @ x.detach().float(), rtol=2**-6, atol=2**-4)


# What is left to torch where C++ kernels cannot run.
OPERATIONS: dict[str, Callable[[], Tensor]] = {
    "attention": lambda: causal_attention(
        rounded(1, 2, 9, 16), rounded(1, 2, 9, 16), rounded(1, 2, 9, 8), None, 0.25, impl="torch"
    ),
    "experts": lambda: moe_experts(
        rounded(12, 16),
        torch.arange(24).view(12, 2) % 4,
        torch.rand(12, 2),
        rounded(4, 2, 8, 16),
        rounded(4, 16, 8),
        impl="grouped",
    ),
    "loss": lambda: linear_cross_entropy(
        rounded(10, 16).requires_grad_(), torch.randn(50, 16, requires_grad=True), torch.arange(10), impl="reference"
    ),
    "Newton-Schulz": lambda: newton_schulz(rounded(2, 8, 12), 5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for lacking in (True, False):
        monkeypatch.setattr(products, "_cpu_lacks_bfloat16", lambda lacking=lacking: lacking)
        torch.manual_seed(0)
        results.append(OPERATIONS[name]().detach())
    wide, plain = results
    assert wide.dtype == plain.dtype
    assert (wide.float() - plain.float()).norm() < 0.01 * plain.float().norm()
