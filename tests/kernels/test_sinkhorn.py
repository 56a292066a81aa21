import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.kernels import native
from engram.kernels.sinkhorn import Implementation, sinkhorn, sinkhorn_ref


def _by_loops(logits: np.ndarray, steps: int) -> np.ndarray:
    size, _, count = logits.shape
    result = np.exp(logits.astype(np.float64))
    for n in range(count):
        for _ in range(steps):
            for column in range(size):
                result[:, column, n] /= sum(result[row, column, n] for row in range(size))
            for row in range(size):
                result[row, :, n] /= sum(result[row, column, n] for column in range(size))
    return result


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_equals_loops(size: int, steps: int, impl: Implementation) -> None:
    logits = torch.randn(size, size, 7) * 2
    expected = torch.from_numpy(_by_loops(logits.numpy(), steps))
    torch.testing.assert_close(sinkhorn(logits, steps, impl).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_native_gradient_equals_the_reference(size: int, count: int) -> None:
    logits = (torch.randn(size, size, count) * 3).requires_grad_()
    direction = torch.randn_like(logits)
    native, reference = (
        torch.autograd.grad((sinkhorn(logits, 20, impl) * direction).sum(), logits)[0]
        for impl in ("native", "reference")
    )
    torch.testing.assert_close(native, reference, atol=5e-6, rtol=1e-4)


def test_native_refuses_what_it_cannot_do() -> None:
    with pytest.raises(RuntimeError, match="for float32 on CPU, not torch.float64 on cpu"):
        sinkhorn(torch.randn(4, 4, 3, dtype=torch.float64), 2, "native")


def test_without_a_compiler_auto_says_so_and_runs_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.load_library.cache_clear()
    native.native_obstacle.cache_clear()
    logits = torch.randn(4, 4, 3)
    try:
        assert torch.equal(sinkhorn(logits, 5), sinkhorn_ref(logits, 5))
        sinkhorn(logits, 5)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "none of cc, gcc, clang was found" in caplog.text
        with pytest.raises(RuntimeError, match="needs a compiler"):
            sinkhorn(logits, 5, "native")
    finally:
        native.load_library.cache_clear()
        native.native_obstacle.cache_clear()


@given(st.integers(2, 6), st.integers(1, 25), st.floats(0.1, 30.0))
def test_rows_sum_to_one_exactly_and_columns_nearly(size: int, steps: int, spread: float) -> None:
    logits = torch.randn(size, size, 11) * spread
    mixing = sinkhorn(logits, steps)
    assert (mixing >= 0).all()
    # The axis that the mix sums over; columns are only as good as the number of steps makes them.
    torch.testing.assert_close(mixing.sum(1), torch.ones(size, 11), atol=1e-6, rtol=0)
    gentle = sinkhorn(torch.randn(size, size, 11) * 0.5, 20)
    torch.testing.assert_close(gentle.sum(0), torch.ones(size, 11), atol=1e-3, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_rows_far_below_the_rest_stay_finite(impl: Implementation) -> None:
    logits = torch.randn(4, 4, 50) * 60
    logits[2] -= 300
    logits.requires_grad_()
    mixing = sinkhorn(logits, 20, impl)
    torch.testing.assert_close(mixing.sum(1), torch.ones(4, 50), atol=1e-5, rtol=0)
    assert torch.autograd.grad(mixing.square().sum(), logits)[0].isfinite().all()


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="sinkhorn has no implementation 'triton'"):
        sinkhorn(torch.randn(2, 2, 3), 2, "triton")


def test_shift_of_all_logits_changes_nothing_and_large_logits_stay_finite() -> None:
    logits = torch.randn(4, 4, 9)
    torch.testing.assert_close(sinkhorn(logits + 200.0, 20), sinkhorn(logits, 20), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_gradient_equals_autograd_of_the_reference(steps: int) -> None:
    logits = (torch.randn(4, 4, 6, dtype=torch.float64) * 2).requires_grad_()
    direction = torch.randn_like(logits)
    (ours,) = torch.autograd.grad((sinkhorn(logits, steps) * direction).sum(), logits)
    (expected,) = torch.autograd.grad((sinkhorn_ref(logits, steps) * direction).sum(), logits)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_operator_registration(impl: Implementation) -> None:
    torch.library.opcheck(torch.ops.engram.sinkhorn.default, (torch.randn(4, 4, 5, requires_grad=True), 3, impl))


def test_compiled_graph_holds_one_operation() -> None:
    """Unrolled, 20 steps in every sublayer would make compilation slower than training."""
    graphs = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    function = torch.compile(lambda x: sinkhorn(x, 20) * 2, backend=backend, fullgraph=True)
    logits = torch.randn(4, 4, 5)
    torch.testing.assert_close(function(logits), sinkhorn_ref(logits, 20) * 2, atol=1e-5, rtol=1e-5)
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(calls) == 2, calls
