import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.causal_attention import causal_attention, causal_attention_ref, native_cpu
from engram.kernels.choose import ImplementationUnavailable
from tests.tolerances import assert_close

SCALE = 0.3
OBSTACLE = native_cpu.native_obstacle("cpu", torch.bfloat16)
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
EVERYWHERE = [
    pytest.param("reference", torch.float32),
    pytest.param("torch", torch.float32),
    pytest.param("torch", torch.bfloat16),
    pytest.param("native", torch.bfloat16, marks=needs_native),
]


def _inputs(
    batch: int, heads: int, length: int, width: int, value_width: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """As the model makes them: q and k transposed, v a slice."""
    q, k = torch.randn(2, batch, length, heads, width).to(dtype).transpose(2, 3)
    wide = torch.randn(batch, length, heads, width + value_width).to(dtype)
    return [q, k, wide[..., width:].transpose(1, 2)]


def _documents(batch: int, length: int, mean_length: int) -> Tensor:
    ids = (torch.rand(batch, length) < 1 / mean_length).cumsum(1)
    return (ids.unsqueeze(1) == ids.unsqueeze(2)).tril().unsqueeze(1)


def _run(function, inputs: list[Tensor], mask: Tensor | None, direction: Tensor, **options: str) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves, mask, SCALE, **options)
    gradients = torch.autograd.grad(out, leaves, direction.to(out.dtype))
    return dict(zip(("output", "q", "k", "v"), (out.detach(), *gradients), strict=True))


def _check(inputs: list[Tensor], mask: Tensor | None, impl: str) -> None:
    direction = torch.randn_like(inputs[2])
    found = _run(causal_attention, inputs, mask, direction, impl=impl)
    expected = _run(causal_attention_ref, [tensor.double() for tensor in inputs], mask, direction)
    for name, want in expected.items():
        assert found[name].dtype == inputs[0].dtype
        assert_close(found[name], want, "causal_attention", name=name, dtype=inputs[0].dtype)


def _by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(t + 1) if mask is None or mask[b, 0, t, s]]
                weights = torch.stack([(q[b, h, t].double() @ k[b, h, s].double()) * scale for s in seen]).softmax(0)
                out[b, h, t] = sum(w * v[b, h, s].double() for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_reference_equals_loops(masked: bool) -> None:
    inputs = [tensor.double() for tensor in _inputs(2, 3, 9, 12, 7)]
    mask = _documents(2, 9, 3) if masked else None
    direction = torch.randn_like(inputs[2])
    expected = _run(_by_loops, inputs, mask, direction)
    for name, found in _run(causal_attention_ref, inputs, mask, direction).items():
        assert_close(found, expected[name], "causal_attention", name=name)


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("length", "width", "value_width"),
    # Several blocks of queries and keys, a part of one, a single position; even and odd widths, either the wider.
    [(64, 48, 32), (300, 33, 17), (9, 12, 16), (1, 2, 3)],
)
def test_outputs_and_gradients_equal_the_reference(
    length: int, width: int, value_width: int, masked: bool, impl: str, dtype: torch.dtype
) -> None:
    mask = _documents(2, length, 40) if masked else None
    _check(_inputs(2, 3, length, width, value_width, dtype), mask, impl)


@needs_native
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40), st.integers(0, 60))
def test_native_for_any_sizes(length: int, width: int, value_width: int, mean_length: int) -> None:
    mask = _documents(1, length, mean_length) if mean_length else None
    _check(_inputs(1, 2, length, width, value_width, torch.bfloat16), mask, "native")


@needs_native
def test_native_with_blocks_that_are_masked_as_a_whole() -> None:
    """Queries whose first keys lie several blocks behind the start."""
    mask = torch.ones(600, 600, dtype=torch.bool).tril()
    mask[520:, :520] = False
    _check(_inputs(1, 1, 600, 16, 16, torch.bfloat16), mask.view(1, 1, 600, 600), "native")


@needs_native
def test_native_with_scores_far_apart() -> None:
    inputs = _inputs(1, 1, 80, 16, 8, torch.bfloat16)
    inputs[0] = inputs[0] * 60
    found = causal_attention(*inputs, None, SCALE, impl="native")
    expected = causal_attention_ref(*(tensor.double() for tensor in inputs), None, SCALE)
    assert_close(found, expected, "causal_attention", dtype=torch.bfloat16)


@needs_native
def test_native_sees_no_future() -> None:
    """Not even infinite values, and not in the gradients."""
    inputs = _inputs(1, 2, 150, 16, 8, torch.bfloat16)
    direction = torch.randn_like(inputs[2])
    direction[:, :, 70:] = 0
    before = _run(causal_attention, inputs, None, direction, impl="native")
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed[1:]:
        tensor[:, :, 70:] = 1e4
    after = _run(causal_attention, changed, None, direction, impl="native")
    for name in before:
        assert torch.equal(before[name][:, :, :70], after[name][:, :, :70]), name
    assert (before["k"][:, :, 70:] == 0).all() and (before["v"][:, :, 70:] == 0).all()


@needs_native
def test_native_is_the_same_for_any_thread_count() -> None:
    inputs, results = _inputs(3, 2, 100, 24, 16, torch.bfloat16), []
    direction = torch.randn_like(inputs[2])
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(_run(causal_attention, inputs, None, direction, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_native
def test_native_writes_what_projections_read() -> None:
    out = causal_attention(*_inputs(2, 3, 20, 16, 8, torch.bfloat16), None, SCALE, impl="native")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
def test_no_sequences(impl: str, dtype: torch.dtype) -> None:
    assert causal_attention(*_inputs(0, 3, 20, 16, 8, dtype), None, SCALE, impl=impl).shape == (0, 3, 20, 8)


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_as_one_graph(impl: str, dtype: torch.dtype, masked: bool) -> None:
    inputs = _inputs(2, 3, 20, 16, 8, dtype)
    mask, direction = _documents(2, 20, 5) if masked else None, torch.randn_like(inputs[2])
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    eager = _run(causal_attention, inputs, mask, direction, impl=impl)
    for name, tensor in _run(compiled, inputs, mask, direction, impl=impl).items():
        torch.testing.assert_close(tensor, eager[name], msg=lambda m, name=name: f"{name}: {m}")


@needs_native
@pytest.mark.parametrize("masked", [False, True])
def test_custom_operations(masked: bool) -> None:
    inputs, mask = _inputs(2, 2, 20, 16, 8, torch.bfloat16), _documents(2, 20, 5) if masked else None
    torch.library.opcheck(torch.ops.engram.causal_attention, (*inputs, mask, SCALE))
    kept = torch.ops.engram.causal_attention(*inputs, mask, SCALE)
    backward = (torch.randn_like(inputs[2]), *inputs, mask, *kept, SCALE)
    torch.library.opcheck(torch.ops.engram.causal_attention_backward, backward)


def test_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("engram.kernels.causal_attention.native_obstacle", lambda *_: "of a test")
    inputs = _inputs(1, 1, 5, 8, 4, torch.bfloat16)
    found = causal_attention(*inputs, None, SCALE)
    assert "causal_attention runs on torch's own operations" in caplog.text and "of a test" in caplog.text
    assert torch.equal(found, causal_attention(*inputs, None, SCALE, impl="torch"))
    with pytest.raises(ImplementationUnavailable, match="native implementation was asked for, but of a test"):
        causal_attention(*inputs, None, SCALE, impl="native")
    caplog.clear()
    causal_attention(*(tensor.float() for tensor in inputs), None, SCALE)
    assert not caplog.text


def test_operands_that_do_not_fit() -> None:
    q, k, v = _inputs(1, 2, 5, 8, 4)
    mask = _documents(1, 5, 2)
    for arguments, error, message in (
        ((q, k.double(), v, None, SCALE), TypeError, "share one dtype"),
        ((q, k[:, :, 1:], v, None, SCALE), ValueError, r"\[1, 2, 5, 8\], \[1, 2, 4, 8\], \[1, 2, 5, 4\]"),
        ((q, k, v, mask[0], SCALE), ValueError, r"mask must be bool \[1, 1, 5, 5\], not torch.bool \[1, 5, 5\]"),
        ((q, k, v, mask.float(), SCALE), ValueError, "mask must be bool"),
        ((q[..., :0], k[..., :0], v, None, SCALE), ValueError, "queries 0 wide and values 4 wide"),
        ((q, k, v[..., :0], None, SCALE), ValueError, "queries 8 wide and values 0 wide"),
        ((q.int(), k.int(), v.int(), None, SCALE), TypeError, "must be floating point, not torch.int32"),
        ((q, k, v, None, 0.0), ValueError, "scale must be positive, not 0.0"),
    ):
        with pytest.raises(error, match=message):
            causal_attention(*arguments)


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
def test_a_mask_opens_no_future(impl: str, dtype: torch.dtype) -> None:
    q, k, v = _inputs(1, 2, 9, 8, 4, dtype)
    everything = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    expected = _by_loops(q, k, v, None, SCALE)
    found = causal_attention(q, k, v, everything, SCALE, impl=impl)
    assert_close(found, expected, "causal_attention", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = [tensor.cuda() for tensor in _inputs(2, 3, 70, 48, 32, dtype)]
    for mask in (None, _documents(2, 70, 20).cuda()):
        _check(inputs, mask, "auto")
