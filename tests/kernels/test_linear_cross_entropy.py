import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels import linear_cross_entropy as module
from engram.kernels.choose import Implementation, ImplementationUnavailable
from engram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref, token_cross_entropy
from engram.kernels.linear_cross_entropy import triton as kernels
from tests.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of 37 classes at a time, and in the kernel 16 classes at a time."""
    for name, value in {"CHUNK_LOGITS": 37 * 5, "CHUNK_LOGITS_CUDA": 37 * 5, "MIN_TOKENS": 1}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(kernels, "BLOCK", 16)


def _inputs(tokens: int = 23, hidden: int = 17, classes: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, targets = torch.randn(tokens, hidden), torch.randn(classes, hidden), torch.randint(0, classes, (tokens,))
    targets[::5] = -100
    return x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def _check(x: Tensor, weight: Tensor, targets: Tensor, impl: Implementation, *, compiled: bool = False) -> None:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, compiled=compiled, impl=impl)
    # In the dtype of the product, because a softmax amplifies the rounding of logits.
    exact = [x.double().requires_grad_(), weight.to(x.dtype).double().requires_grad_()]
    expected = linear_cross_entropy_ref(*exact, targets).sum()
    actual = (loss, *torch.autograd.grad(loss / 4067, leaves))
    wanted = (expected, *torch.autograd.grad(expected / 4067, exact))
    for name, got, want, dtype in zip(
        ("loss", "x", "weight"), actual, wanted, (torch.float32, x.dtype, torch.float32), strict=True
    ):
        assert got.dtype == dtype
        assert_close(got, want, "linear_cross_entropy", name=name, dtype=x.dtype)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("impl", "compiled"), [("reference", False), ("reference", True), ("triton", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_reference(impl: Implementation, compiled: bool, dtype: torch.dtype) -> None:
    x, weight, targets = _inputs()
    _check(x.to(dtype), weight, targets, impl, compiled=compiled)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_chunk_and_a_last_chunk_of_one_token(monkeypatch: pytest.MonkeyPatch, impl: Implementation) -> None:
    _check(*_inputs(), impl)
    monkeypatch.setattr(module, "MIN_TOKENS", 1)
    for name in ("CHUNK_LOGITS", "CHUNK_LOGITS_CUDA"):
        monkeypatch.setattr(module, name, 37 * 11)
    _check(*_inputs(), impl)


@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.sampled_from(IMPLEMENTATIONS))
def test_any_shape(tokens: int, hidden: int, classes: int, impl: Implementation) -> None:
    _check(*_inputs(tokens, hidden, classes), impl)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_losses_of_single_tokens(impl: Implementation) -> None:
    x, weight, targets = _inputs()
    losses = token_cross_entropy(x, weight, targets, impl=impl)
    assert_close(losses, linear_cross_entropy_ref(x.double(), weight.double(), targets), "linear_cross_entropy")
    assert (losses[::5] == 0).all()
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets, impl=impl), losses.sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl: Implementation) -> None:
    x, weight, targets = _inputs(0)
    assert token_cross_entropy(x, weight, targets, impl=impl).shape == (0,)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, impl=impl)
    grad_x, grad_weight = torch.autograd.grad(loss, leaves)
    assert loss == 0 and grad_x.shape == x.shape and (grad_weight == 0).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_repeats_bitwise_and_leaves_its_inputs_alone(impl: Implementation) -> None:
    x, weight, targets = _inputs()
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, impl=impl)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    repeated = torch.autograd.grad(linear_cross_entropy(*leaves, targets, impl=impl), leaves)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(first, again, repeated, strict=True))
    assert leaves[0].equal(x) and leaves[1].equal(weight)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_registration(impl: Implementation) -> None:
    x, weight, targets = _inputs()
    torch.library.opcheck(torch.ops.engram.token_cross_entropy.default, (x, weight, targets, impl))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(torch.ops.engram.linear_cross_entropy.default, (*leaves, targets, False, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_graphs_hold_it(impl: Implementation) -> None:
    def scaled(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, impl=impl) / 3

    x, weight, targets = _inputs()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    losses = compiled(*leaves, targets), scaled(*leaves, targets)
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    assert losses[0].equal(losses[1])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("target", [37, -1, -99, 2**62])
def test_targets_out_of_range(target: int) -> None:
    """The kernel, which cannot raise, makes the loss NaN."""
    logits, targets = torch.randn(2, 37, device=DEVICE), torch.tensor([0, target], device=DEVICE)
    assert kernels.cross_entropy_triton(logits, targets).isnan().tolist() == [False, True]
    assert kernels.cross_entropy_triton_(logits, targets).isnan().tolist() == [False, True]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("target", [37, -1, -99, 2**62])
def test_targets_out_of_range_are_named_on_cpu(target: int, impl: Implementation) -> None:
    x, weight, targets = (tensor.cpu() for tensor in _inputs())
    targets[7] = target
    message = rf"target {target} at \[7\] is none of the 37 classes: targets are 0 to 36, or -100 where no loss"
    for differentiated in (False, True):
        with pytest.raises(IndexError, match=message):
            linear_cross_entropy(x.requires_grad_(differentiated), weight, targets, impl=impl)
    with pytest.raises(IndexError, match=message):
        token_cross_entropy(x, weight, targets, impl=impl)


def test_bad_input() -> None:
    x, weight, targets = _inputs()
    with pytest.raises(ValueError, match=r"not \[23, 17\], \[37, 16\] and \[23\]"):
        linear_cross_entropy(x, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"not \[23, 17\], \[37, 17\] and \[22\]"):
        token_cross_entropy(x, weight, targets[1:])
    with pytest.raises(ValueError, match="a weight \\[V, D\\] of at least one row, not none"):
        linear_cross_entropy(x, weight[:0], targets)
    with pytest.raises(TypeError, match=r"not torch.float32, torch.float32 and torch.int32"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match="no implementation 'native': choose one of auto, reference, triton"):
        linear_cross_entropy(x, weight, targets, impl="native")


def test_triton_asked_for_on_cpu_without_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, targets = (tensor.cpu() for tensor in _inputs())
    with pytest.raises(ImplementationUnavailable, match="the triton implementation was asked for, but the tensors are"):
        linear_cross_entropy(x, weight, targets, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl: Implementation) -> None:
    x = torch.tensor([[1000.0], [-1000.0]], device=DEVICE)
    weight, targets = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    assert token_cross_entropy(x, weight, targets, impl=impl).tolist() == [0.0, 2000.0]
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets, impl=impl)
    assert loss.item() == 2000.0
    assert torch.autograd.grad(loss, x)[0].tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_targets_ignored(impl: Implementation) -> None:
    x, weight, _ = _inputs(4)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, torch.full((4,), -100, device=DEVICE), impl=impl)
    assert loss == 0 and all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


def test_the_loss_scales_all_gradients_alike() -> None:
    """1 / 4067 is no bfloat16 number: rounding it would scale the backbone's gradient but not the head's."""
    x, weight = torch.randn(4000, 17).bfloat16().requires_grad_(), torch.randn(37, 17)
    targets = torch.randint(0, 37, (4000,))
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)[0].float()
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, targets) / 4067, x)[0].float()
    ratio = (scaled * 4067 * whole).sum() / whole.square().sum()
    assert abs(ratio.item() - 1) < 4e-4


def test_no_second_derivative_is_half_computed() -> None:
    x, weight, targets = _inputs()
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64)).grad_fn is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS_CUDA", 10007 * 256)
    x, weight, targets = _inputs(1000, 192, 10007)
    _check(x.to(dtype), weight, targets, "triton")


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    x, weight, targets = _inputs(500, 64, 1000)
    leaves = [x.bfloat16().requires_grad_(), weight.requires_grad_()]
    linear_cross_entropy(*leaves, targets).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*leaves, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
