import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels import native
from engram.kernels.choose import Implementation, ImplementationUnavailable
from engram.kernels.mhc_pre_post import mhc_post, mhc_pre, mhc_pre_carry
from tests.tolerances import assert_close

IMPLEMENTATIONS: list[Implementation] = ["reference", "native", "triton"]
FAST: list[Implementation] = ["native", "triton"]
GRADIENTS = ("x", "weight", "scale", "bias", "y")
Inputs = dict[str, Tensor]


def make_inputs(
    streams: int, width: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> Inputs:
    outputs = streams * (streams + 2)
    inputs = {
        "x": torch.randn(*shape, streams, width),
        "weight": torch.randn(outputs, streams * width) / (streams * width) ** 0.5,
        "scale": torch.randn(3),
        "bias": torch.randn(outputs) * spread,
        "y": torch.randn(*shape, width),
        "direction": torch.randn(*shape, streams, width),
    }
    # Both ops round the weight to the dtype of x: rounded beforehand, it is the same for the float64 reference.
    return {
        name: tensor.to(dtype).to(dtype if name in ("x", "y", "direction") else torch.float32)
        for name, tensor in inputs.items()
    }


def run(inputs: Inputs, impl: Implementation, *, steps: int = 3, carry: bool = True) -> Inputs:
    """Outputs of both ops with a sublayer y * u between them, and the gradient of every input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    u, h_post, h_res, x = mhc_pre_carry(
        *(leaves[name] for name in ("x", "weight", "scale", "bias")), steps=steps, eps=1e-6, impl=impl
    )
    out = mhc_post(x if carry else leaves["x"], u * leaves["y"], h_post, h_res, impl=impl)
    gradients = torch.autograd.grad(out, [leaves[name] for name in GRADIENTS], leaves["direction"].detach())
    named = {f"gradient of {name}": value for name, value in zip(GRADIENTS, gradients, strict=True)}
    return {"u": u, "h_post": h_post, "h_res": h_res, "out": out, **named}


def check(inputs: Inputs, impl: Implementation, steps: int = 3, carry: bool = True) -> None:
    exact = run({name: tensor.double() for name, tensor in inputs.items()}, "reference", steps=steps)
    for name, actual in run(inputs, impl, steps=steps, carry=carry).items():
        assert_close(actual, exact[name], "mhc", name=name, dtype=inputs["x"].dtype)


def mix_by_loops(logits: np.ndarray, steps: int) -> np.ndarray:
    result = np.exp(logits.astype(np.float64))
    for _ in range(steps):
        for column in range(len(result)):
            result[:, column] /= sum(result[row, column] for row in range(len(result)))
        for row in range(len(result)):
            result[row] /= sum(result[row, column] for column in range(len(result)))
    return result


def mixing(logits: Tensor, steps: int, impl: Implementation) -> Tensor:
    """Sinkhorn alone: h_res of matrices [N, G, G] that come in as biases, one op call each."""
    streams = logits.shape[1]
    x, outputs = torch.ones(1, 1, streams, 16), streams * (streams + 2)
    gates = torch.zeros(2 * streams)
    rows = [
        mhc_pre(
            x,
            torch.zeros(outputs, streams * 16),
            torch.zeros(3),
            torch.cat((gates, each.flatten())),
            steps=steps,
            eps=1e-6,
            impl=impl,
        )[2][0, 0]
        for each in logits
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("streams", [1, 2, 4, 5])
@pytest.mark.parametrize("steps", [1, 20])
def test_mixing_equals_loops(streams: int, steps: int, impl: Implementation) -> None:
    logits = torch.randn(2, streams, streams) * 2
    expected = np.stack([mix_by_loops(each, steps) for each in logits.numpy()])
    torch.testing.assert_close(mixing(logits, steps, impl).double(), torch.from_numpy(expected), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("streams", "width", "shape"), [(4, 48, (2, 11)), (1, 16, (1, 5)), (3, 160, (1, 3)), (8, 16, (1, 17))]
)
def test_outputs_and_gradients(
    streams: int, width: int, shape: tuple[int, int], dtype: torch.dtype, impl: Implementation
) -> None:
    check(make_inputs(streams, width, shape, dtype), impl)


@pytest.mark.parametrize("impl", FAST)
def test_twenty_steps_without_carrying(impl: Implementation) -> None:
    check(make_inputs(4, 32, (1, 5)), impl, steps=20, carry=False)


def test_many_chunks_of_tokens() -> None:
    """The weight's gradient is summed over chunks of 256 tokens."""
    check(make_inputs(4, 16, (3, 301)), "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 40), st.integers(1, 25), st.floats(0.1, 4.0))
def test_native_sweep(
    dtype: torch.dtype, streams: int, sixteenths: int, tokens: int, steps: int, spread: float
) -> None:
    check(make_inputs(streams, 16 * sixteenths, (1, tokens), dtype, spread), "native", steps)


@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 18), st.integers(1, 5))
@settings(max_examples=8)
def test_triton_sweep(streams: int, sixteenths: int, tokens: int, steps: int) -> None:
    check(make_inputs(streams, 16 * sixteenths, (1, tokens)), "triton", steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("streams", "width", "shape"), [(4, 2560, (2, 333)), (4, 192, (1, 9001)), (1, 48, (1, 5)), (8, 768, (1, 70))]
)
def test_on_a_gpu(streams: int, width: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check({name: tensor.cuda() for name, tensor in make_inputs(streams, width, shape, dtype).items()}, "triton", 20)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_of_the_mixing_sum_to_one_in_bfloat16_too(impl: Implementation) -> None:
    inputs = make_inputs(4, 32, (1, 9), torch.bfloat16, spread=3.0)
    h_res = run(inputs, impl, steps=2)["h_res"]
    assert h_res.dtype == torch.float32
    torch.testing.assert_close(h_res.sum(-1), torch.ones(1, 9, 4), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_far_below_the_rest_stay_finite(impl: Implementation) -> None:
    inputs = make_inputs(4, 16, (1, 3), spread=60.0)
    inputs["bias"][8 + 2 * 4 : 8 + 3 * 4] -= 300
    results = run(inputs, impl, steps=20)
    torch.testing.assert_close(results["h_res"].sum(-1), torch.ones(1, 3, 4), atol=1e-5, rtol=0)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_is_not_hidden(impl: Implementation) -> None:
    inputs = make_inputs(4, 16, (1, 3))
    inputs["x"][0, 1, 2, 3] = float("nan")
    results = run(inputs, impl)
    for name in ("u", "h_post", "h_res", "out"):
        assert results[name][0, 1].isnan().any() and results[name][0, ::2].isfinite().all(), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_shift_of_all_logits_changes_nothing(impl: Implementation) -> None:
    logits = torch.randn(2, 4, 4)
    torch.testing.assert_close(mixing(logits + 200.0, 20, impl), mixing(logits, 20, impl), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", FAST)
def test_only_some_outputs_have_gradients(impl: Implementation) -> None:
    inputs = make_inputs(4, 16, (1, 3))
    parameters = [inputs[name].requires_grad_() for name in ("x", "weight", "scale", "bias")]
    for index in range(4):
        ours, theirs = (
            torch.autograd.grad(
                mhc_pre_carry(*parameters, steps=3, eps=1e-6, impl=each)[index].square().sum(),
                parameters,
                materialize_grads=True,
            )
            for each in (impl, "reference")
        )
        for name, actual, expected in zip(GRADIENTS, ours, theirs, strict=False):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5, msg=f"{name} of output {index}")


@pytest.mark.parametrize("impl", FAST)
def test_streams_that_are_views(impl: Implementation) -> None:
    x = torch.randn(2, 3, 1, 16).expand(-1, -1, 4, -1)
    rest = [make_inputs(4, 16, (2, 3))[name] for name in ("weight", "scale", "bias")]
    expected = mhc_pre(x.contiguous(), *rest, steps=2, eps=1e-6, impl=impl)
    for actual, same in zip(mhc_pre(x, *rest, steps=2, eps=1e-6, impl=impl), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl: Implementation) -> None:
    results = run(make_inputs(2, 16, (3, 0)), impl)
    assert results["u"].shape == (3, 0, 16) and results["h_res"].shape == (3, 0, 2, 2)
    assert not results["gradient of weight"].any() and not results["gradient of scale"].any()


@pytest.mark.parametrize("impl", FAST)
def test_repetition_gives_the_same_bits(impl: Implementation) -> None:
    inputs = make_inputs(4, 16, (1, 600 if impl == "native" else 70))
    first, second = run(inputs, impl), run(inputs, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_number_of_threads_changes_nothing() -> None:
    inputs, threads = make_inputs(4, 16, (1, 1000)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(inputs, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


@pytest.mark.parametrize("impl", FAST)
def test_operator_registration(impl: Implementation) -> None:
    inputs = make_inputs(4, 16, (1, 3))
    x, y = inputs["x"][0], inputs["y"][0]
    parameters = [inputs[name] for name in ("weight", "scale", "bias")]
    ops = torch.ops.engram
    u, h_post, h_res, *kept = ops.mhc_pre(x, *parameters, 2, 1e-6, impl)
    torch.library.opcheck(ops.mhc_pre.default, (x, *parameters, 2, 1e-6, impl))
    torch.library.opcheck(ops.mhc_pre_backward.default, (x, *parameters, *kept, u, x, h_post, h_res, 2, impl))
    torch.library.opcheck(ops.mhc_pre_backward.default, (x, *parameters, *kept, u, None, h_post, h_res, 2, impl))
    torch.library.opcheck(ops.mhc_post.default, (x, y, h_post, h_res, impl))
    torch.library.opcheck(ops.mhc_post_backward.default, (x, y, h_post, h_res, x, impl))


def test_compiled_graph_keeps_the_operations_whole() -> None:
    inputs = make_inputs(4, 16, (1, 5))
    compiled = torch.compile(lambda given: run_forward(given), backend="aot_eager", fullgraph=True)
    leaves = [{name: tensor.clone().requires_grad_() for name, tensor in inputs.items()} for _ in range(2)]
    outputs = [compiled(leaves[0]), run_forward(leaves[1])]
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(inputs["direction"])
    for name in GRADIENTS:
        torch.testing.assert_close(leaves[0][name].grad, leaves[1][name].grad, msg=name)


def run_forward(inputs: Inputs) -> Tensor:
    u, h_post, h_res, x = mhc_pre_carry(*(inputs[name] for name in ("x", "weight", "scale", "bias")), steps=3, eps=1e-6)
    return mhc_post(x, u * inputs["y"], h_post, h_res)


def test_bad_input() -> None:
    inputs = make_inputs(4, 16, (1, 3))
    x, weight, scale, bias = (inputs[name] for name in ("x", "weight", "scale", "bias"))
    with pytest.raises(TypeError, match="x is torch.int64"):
        mhc_pre(x.long(), weight, scale, bias, steps=2, eps=1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 16\), expected \[batch, tokens, streams, width\]"):
        mhc_pre(x[0], weight, scale, bias, steps=2, eps=1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \(24, 32\), but the streams need \[24, 64\]"):
        mhc_pre(x, weight[:, :32], scale, bias, steps=2, eps=1e-6)
    with pytest.raises(ValueError, match="steps is 0"):
        mhc_pre(x, weight, scale, bias, steps=0, eps=1e-6)
    with pytest.raises(TypeError, match="mhc_pre needs an integer for steps, not 2.5"):
        mhc_pre(x, weight, scale, bias, steps=2.5, eps=1e-6)  # type: ignore[arg-type]
    u, h_post, h_res = mhc_pre(x, weight, scale, bias, steps=2, eps=1e-6)
    with pytest.raises(ValueError, match=r"h_res has shape \(1, 3, 3, 4\)"):
        mhc_post(x, u, h_post, h_res[:, :, :3])
    with pytest.raises(TypeError, match="y is torch.bfloat16, but x is torch.float32"):
        mhc_post(x, u.bfloat16(), h_post, h_res)


@pytest.mark.parametrize(
    ("streams", "width", "dtype", "reason"),
    [
        (4, 24, torch.float32, "streams are 24 wide, and it takes widths that are multiples of 16"),
        (9, 16, torch.float32, "there are 9 streams, and it is for 1 to 8"),
        (4, 16, torch.float64, "not torch.float64"),
    ],
)
@pytest.mark.parametrize("impl", FAST)
def test_what_kernels_cannot_do_runs_as_the_reference(
    streams: int, width: int, dtype: torch.dtype, reason: str, impl: Implementation
) -> None:
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(streams, width, (1, 2)).items()}
    with pytest.raises(ImplementationUnavailable, match=reason):
        run(inputs, impl)
    automatic, reference = run(inputs, "auto"), run(inputs, "reference")
    assert all(torch.equal(automatic[name], reference[name]) for name in reference)


def test_without_a_compiler_auto_says_so_and_runs_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.load_library.cache_clear()
    native.native_obstacle.cache_clear()
    inputs = make_inputs(4, 16, (1, 3))
    try:
        automatic, reference = run(inputs, "auto"), run(inputs, "reference")
        assert all(torch.equal(automatic[name], reference[name]) for name in reference)
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert "none of c++, g++, clang++ was found" in caplog.text
        with pytest.raises(ImplementationUnavailable, match="native kernels need a compiler"):
            run(inputs, "native")
    finally:
        native.load_library.cache_clear()
        native.native_obstacle.cache_clear()


@given(st.integers(2, 6), st.integers(1, 25), st.floats(0.1, 30.0))
def test_rows_sum_to_one_exactly_and_columns_nearly(size: int, steps: int, spread: float) -> None:
    result = mixing(torch.randn(3, size, size) * spread, steps, "native")
    assert (result >= 0).all()
    # The axis that the mix sums over; columns are only as good as the number of steps makes them.
    torch.testing.assert_close(result.sum(-1), torch.ones(3, size), atol=1e-6, rtol=0)
    gentle = mixing(torch.randn(3, size, size) * 0.5, 20, "native")
    torch.testing.assert_close(gentle.sum(-2), torch.ones(3, size), atol=1e-3, rtol=0)
