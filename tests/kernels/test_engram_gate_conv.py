"""Every implementation of the gate and convolution against the reference in float64, output and gradients by name.

Near a score of 0 the signed square root turns the rounding of a score into any slope, so hidden states here lean to or
from their key; the floor itself has a test of its own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.choose import ImplementationUnavailable
from engram.kernels.engram_gate_conv import engram_gate_conv, engram_gate_conv_ref
from tests.tolerances import assert_close

FAST = ["native", pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on the GPU"))]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("hidden", "keys_and_value", "gain", "conv_weight", "conv_gain")


@dataclass(frozen=True)
class Case:
    """Arguments of one call; tensors by name, None where the case has none."""

    tensors: dict[str, Tensor | None]
    alive: Tensor
    settings: dict[str, Any]
    cotangent: Tensor

    def run(self, impl: str, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """Output, gates and each gradient; the reference runs in `dtype`, the others in the tensors' own."""
        leaves = {
            name: None if tensor is None else tensor.detach().clone().to(device, dtype).requires_grad_()
            for name, tensor in self.tensors.items()
        }
        hidden, keys_and_value, gain, conv_weight, conv_gain = leaves.values()
        function = engram_gate_conv_ref if impl == "reference" else engram_gate_conv
        extra = {} if impl == "reference" else {"impl": impl}
        out, gates = function(
            hidden, keys_and_value, self.alive.to(device), gain, conv_weight, conv_gain, **self.settings, **extra
        )
        out.backward(self.cotangent.to(device, out.dtype))
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        return {"out": out.detach(), "gates": gates, **present}

    def compare(self, impl: str, device: str = "cpu") -> None:
        dtype = self.cotangent.dtype
        actual, expected = self.run(impl, device=device), self.run("reference", torch.float64)
        if self.settings["gate"] is None:
            expected.pop("gradient of hidden", None)
        assert actual.keys() == expected.keys()
        assert actual["out"].dtype == dtype
        assert actual["gates"].dtype == torch.float32
        for name, want in expected.items():
            kind = "gate" if name == "gates" else "gate_conv" if name == "out" else "gate_conv_grad"
            assert_close(actual[name], want, kind, name=name, dtype=dtype)


def case(
    shape: tuple[int, int, int, int],
    *,
    gate: str | None = "signed_sqrt",
    taps: int = 4,
    dilation: int = 3,
    dtype: torch.dtype = torch.float32,
    dead: float = 0.2,
    eps: float = 1e-6,
    conv_eps: float = 1e-5,
) -> Case:
    batch, length, streams, width = shape
    hidden = torch.randn(shape)
    keys = torch.randn(shape) + torch.randn(batch, length, streams, 1).sign() * hidden
    gated = gate is not None
    columns = [keys.flatten(2)] if gated else []
    tensors = {
        "hidden": hidden.to(dtype),
        "keys_and_value": torch.cat([*columns, torch.randn(batch, length, width)], -1).to(dtype),
        "gain": 1 + 0.3 * torch.randn(streams, width) if gated else None,
        "conv_weight": torch.randn(streams * width, 1, taps) if taps else None,
        "conv_gain": torch.randn(streams, width) if taps else None,
    }
    alive = torch.rand(batch, length) >= dead
    return Case(
        tensors,
        alive,
        dict(gate=gate, dilation=dilation, eps=eps, conv_eps=conv_eps),
        torch.randn(shape).to(dtype),
    )


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("gate", ["signed_sqrt", "plain", None])
@pytest.mark.parametrize("taps", [0, 4])
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(impl: str, gate: str | None, taps: int, streams: int, dtype: torch.dtype) -> None:
    case((2, 13, streams, 48), gate=gate, taps=taps, dtype=dtype).compare(impl)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (2, 5), (3, 2), (5, 1), (8, 1)])
def test_taps_and_dilations(impl: str, taps: int, dilation: int) -> None:
    case((2, 11, 2, 16), taps=taps, dilation=dilation).compare(impl)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("streams", "width"), [(8, 16), (1, 272)])
def test_eight_streams_and_more_columns_than_one_tile(impl: str, streams: int, width: int) -> None:
    case((1, 5, streams, width)).compare(impl)


@pytest.mark.parametrize(("batch", "length"), [(1, 300), (3, 129), (200, 2)])
def test_native_chunks_meet_without_a_seam(batch: int, length: int) -> None:
    case((batch, length, 2, 24)).compare("native")


def test_triton_chains_meet_without_a_seam() -> None:
    case((1, 110, 1, 16), dilation=2).compare("triton")


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 8), st.integers(1, 70), st.integers(0, 8), st.integers(1, 6),
    st.sampled_from(["signed_sqrt", "plain", None]), st.floats(0, 1),
)  # fmt: skip
def test_native_takes_any_shape(
    batch: int, length: int, streams: int, width: int, taps: int, dilation: int, gate: str | None, dead: float
) -> None:
    # Narrow rows and a large eps: no norm hangs on one tiny number.
    sizes = dict(eps=0.1, conv_eps=0.1)
    sample = case(
        (batch, length, streams, width), gate=gate and "plain", taps=taps, dilation=dilation, dead=dead, **sizes
    )
    sample.compare("native")


@settings(max_examples=6)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3),
    st.sampled_from(["plain", None]),
)  # fmt: skip
def test_triton_takes_any_shape(
    length: int, streams: int, sixteenths: int, taps: int, dilation: int, gate: str | None
) -> None:
    shape = (1, length, streams, 16 * sixteenths)
    case(shape, gate=gate, taps=taps, dilation=dilation, eps=0.1, conv_eps=0.1).compare("triton")


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("gate", ["signed_sqrt", None])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_dead_tokens_are_silent_whatever_they_hold(impl: str, gate: str | None, poison: float) -> None:
    clean = case((1, 7, 2, 16), gate=gate, dead=0)
    clean.alive[0, [0, 3]] = False
    hidden, keys_and_value = clean.tensors["hidden"].clone(), clean.tensors["keys_and_value"].clone()
    hidden[~clean.alive] = poison
    keys_and_value[~clean.alive] = poison
    poisoned = replace(clean, tensors={**clean.tensors, "hidden": hidden, "keys_and_value": keys_and_value})
    expected, actual = clean.run(impl), poisoned.run(impl)
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name
    for name in ("gates", "gradient of keys_and_value", *(["gradient of hidden"] if gate else [])):
        assert actual[name][~clean.alive].count_nonzero() == 0


@pytest.mark.parametrize("impl", FAST)
def test_below_the_floor_the_gate_is_constant(impl: str) -> None:
    sample = case((1, 2, 1, 16), taps=0, dead=0)
    hidden, keys = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)
    hidden[..., 0], keys[..., 1] = 1.0, 1.0
    # Scores of about 4e-6 and 4e-7: one on each side of the floor.
    keys[0, :, 0, 0] = torch.tensor([1e-6, 1e-7])
    value = sample.tensors["keys_and_value"][..., 16:]
    tensors = {**sample.tensors, "hidden": hidden, "keys_and_value": torch.cat([keys.flatten(2), value], -1)}
    replace(sample, tensors=tensors).compare(impl)
    gradient = replace(sample, tensors=tensors).run(impl)["gradient of hidden"]
    assert gradient[0, 0].count_nonzero() > 0
    assert gradient[0, 1].count_nonzero() == 0


@pytest.mark.parametrize("impl", FAST)
def test_a_gate_that_rounds_to_zero_is_no_dead_token(impl: str) -> None:
    sample = case((1, 5, 2, 128), gate="plain", dilation=1, dead=0)
    sample.tensors["keys_and_value"][..., :128] = -sample.tensors["hidden"][:, :, 0]
    sample.tensors["gain"][0] = 20.0
    assert sample.run(impl)["gates"][..., 0].count_nonzero() == 0
    sample.compare(impl)


@pytest.mark.parametrize("impl", FAST)
def test_small_values_meet_the_epsilon_of_the_second_norm(impl: str) -> None:
    # Here the norm lets the size of the value through, and with it a gradient to the gate.
    sample = case((2, 9, 2, 16))
    sample.tensors["keys_and_value"][..., -16:] *= 3e-3
    sample.compare(impl)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty_batches(impl: str, shape: tuple[int, ...]) -> None:
    result = case(shape).run(impl)
    assert result["out"].shape == shape
    assert result["gates"].shape == shape[:3]
    for name in ("gain", "conv_weight", "conv_gain"):
        assert result[f"gradient of {name}"].count_nonzero() == 0


def test_the_number_of_threads_changes_nothing() -> None:
    sample = case((3, 200, 2, 40))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(sample.run("native"))
    finally:
        torch.set_num_threads(before)
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("impl", FAST)
def test_non_contiguous_inputs(impl: str) -> None:
    sample = case((2, 6, 2, 16))
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in sample.tensors.items() if name in NAMES[:2]}
    replace(sample, tensors={**sample.tensors, **strided}).compare(impl)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("gate", "taps"), [("signed_sqrt", 4), ("plain", 0), (None, 2)])
def test_operator_registration(impl: str, gate: str | None, taps: int) -> None:
    sample = case((1, 4, 2, 16), gate=gate, taps=taps)
    hidden, keys_and_value, gain, conv_weight, conv_gain = sample.tensors.values()
    folded = None if conv_weight is None else (conv_weight.view(2, 16, -1) * conv_gain[..., None]).permute(2, 0, 1)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, keys_and_value, gain, folded)]
    inputs = (*leaves[:2], sample.alive, *leaves[2:], gate, 3, 1e-6, 1e-5, impl)
    torch.library.opcheck(torch.ops.engram.engram_gate_conv.default, inputs)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_a_compiled_call_is_one_graph_and_computes_the_same(impl: str) -> None:
    sample = case((1, 9, 2, 16))
    leaves = [tensor.clone().requires_grad_() for tensor in sample.tensors.values()]

    def call(hidden: Tensor, keys_and_value: Tensor, *rest: Tensor) -> Tensor:
        return engram_gate_conv(hidden, keys_and_value, sample.alive, *rest, **sample.settings, impl=impl)[0]

    expected = torch.autograd.grad(call(*leaves), leaves, sample.cotangent)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    for name, actual, want in zip(NAMES, torch.autograd.grad(compiled(*leaves), leaves, sample.cotangent), expected):  # noqa: B905
        assert torch.equal(actual, want), name


def test_gates_carry_no_gradient() -> None:
    for impl in ("reference", "native"):
        tensors = [t.clone().requires_grad_() for t in case((1, 3, 2, 16)).tensors.values()]
        alive = torch.ones(1, 3, dtype=torch.bool)
        _, gates = engram_gate_conv(*tensors[:2], alive, *tensors[2:], gate="plain", eps=1e-6, conv_eps=1e-5, impl=impl)
        assert not gates.requires_grad


def test_bad_input_is_named() -> None:
    sample = case((2, 3, 2, 16))

    def call(impl: str = "auto", **changes: Any) -> None:
        arguments = {**sample.tensors, "alive": sample.alive, **sample.settings, **changes}
        engram_gate_conv(**arguments, impl=impl)

    keys_and_value = sample.tensors["keys_and_value"]
    with pytest.raises(TypeError, match="keys_and_value is torch.bfloat16, but hidden torch.float32"):
        call(keys_and_value=keys_and_value.bfloat16())
    with pytest.raises(
        ValueError, match=r"keys_and_value has the shape \[2, 3, 32\], but hidden asks for \[2, 3, 48\]"
    ):
        call(keys_and_value=keys_and_value[..., :32])
    with pytest.raises(ValueError, match=r"alive has the shape \[2, 2\], but hidden asks for \[2, 3\]"):
        call(alive=sample.alive[:, :2])
    with pytest.raises(ValueError, match=r"hidden \[2, 3, 2, 0\] must have at least one stream and one channel"):
        call(hidden=sample.tensors["hidden"][..., :0])
    with pytest.raises(TypeError, match=r"alive must be torch.bool, not torch.int64"):
        call(alive=sample.alive.long())
    with pytest.raises(ValueError, match="has no gate 'tanh'"):
        call(gate="tanh")
    with pytest.raises(ValueError, match="a gate and its gain come together"):
        call(gate=None)
    with pytest.raises(ValueError, match="conv_weight and conv_gain come together"):
        call(conv_gain=None)
    with pytest.raises(ValueError, match="conv_weight has no taps"):
        call(conv_weight=torch.randn(32, 1, 0))
    with pytest.raises(ValueError, match="dilation is 0"):
        call(dilation=0)
    for impl in ("auto", "reference"):
        with pytest.raises(TypeError, match="engram_gate_conv needs an integer for dilation, not 1.5"):
            call(impl, dilation=1.5)
    with pytest.raises(ValueError, match=r"hidden must be floating point \[B, T, G, D\]"):
        call(hidden=sample.tensors["hidden"][0])
    with pytest.raises(ValueError, match="has no implementation 'cuda'"):
        call(impl="cuda")


def test_what_an_implementation_cannot_do_is_said() -> None:
    narrow, wide = case((1, 3, 2, 24)), case((1, 3, 9, 16), taps=0)
    with pytest.raises(
        ImplementationUnavailable, match="streams are 24 wide, and it takes widths that are multiples of 16"
    ):
        narrow.run("triton")
    with pytest.raises(ImplementationUnavailable, match="up to 8 streams and 8 taps, not 9 and 0"):
        wide.run("native")
    with pytest.raises(ImplementationUnavailable, match="float32 and bfloat16, not torch.float64"):
        narrow.run("native", torch.float64)
    # Plain torch has no such limits.
    assert wide.run("auto")["out"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gate", "taps"), [("signed_sqrt", 4), ("plain", 0), (None, 4)])
@pytest.mark.parametrize("shape", [(2, 130, 4, 2560), (3, 67, 1, 128), (1, 33, 4, 5120)])
def test_on_a_gpu(shape: tuple[int, int, int, int], gate: str | None, taps: int, dtype: torch.dtype) -> None:
    sample = case(shape, gate=gate, taps=taps, dtype=dtype)
    sample.compare("triton", device="cuda")
    first, second = sample.run("triton", device="cuda"), sample.run("triton", device="cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)
