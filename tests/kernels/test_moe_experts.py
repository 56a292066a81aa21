"""Routed experts in torch and C++ against the loop over experts; Triton has a file of its own."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.choose import ImplementationUnavailable
from engram.kernels.moe_experts import grouped, moe_experts, moe_experts_ref, native_cpu
from engram.kernels.moe_experts.grouped import BLOCK, assign_slots
from tests.tolerances import assert_close

NAMES = ("x", "weights", "gate_up", "down")
OBSTACLE = native_cpu.native_obstacle("cpu", torch.bfloat16)
needs_native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
EVERYWHERE = [
    pytest.param("reference", torch.float32),
    pytest.param("grouped", torch.float32),
    pytest.param("grouped", torch.bfloat16),
    pytest.param("native", torch.bfloat16, marks=needs_native),
]


def _inputs(
    tokens: int, hidden: int, experts: int, width: int, dtype: torch.dtype = torch.float32, top_k: int = 2
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(tokens, hidden).to(dtype),
        "weights": torch.rand(tokens, top_k),
        "gate_up": (torch.randn(experts, 2, width, hidden) / hidden**0.5).to(dtype),
        "down": (torch.randn(experts, hidden, width) / width**0.5).to(dtype),
    }


def _ids(tokens: int, experts: int, top_k: int = 2) -> Tensor:
    return torch.rand(tokens, experts).topk(top_k).indices


def _run(function, tensors: dict[str, Tensor], ids: Tensor, direction: Tensor, **options: str) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(leaves["x"], ids, leaves["weights"], leaves["gate_up"], leaves["down"], **options)
    gradients = torch.autograd.grad(y, [leaves[name] for name in NAMES], direction.to(y.dtype))
    return {"output": y.detach(), **dict(zip(NAMES, gradients, strict=True))}


def _check(tensors: dict[str, Tensor], ids: Tensor, impl: str) -> dict[str, Tensor]:
    dtype = tensors["x"].dtype
    direction = torch.randn_like(tensors["x"])
    actual = _run(moe_experts, tensors, ids, direction, impl=impl)
    expected = _run(moe_experts_ref, {name: tensor.double() for name, tensor in tensors.items()}, ids, direction)
    for name, want in expected.items():
        assert actual[name].dtype == tensors.get(name, tensors["x"]).dtype
        assert_close(actual[name], want, "moe_experts", name=name, dtype=dtype)
    return actual


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_outputs_and_gradients_equal_the_reference(tokens: int, impl: str, dtype: torch.dtype) -> None:
    ids = _ids(tokens, 5)
    for hidden, width in ((24, 40), (10, 7), (33, 16)):
        _check(_inputs(tokens, hidden, 5, width, dtype), ids, impl)


@needs_native
@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
def test_native_for_any_sizes(tokens: int, hidden: int, width: int, experts: int, top_k: int) -> None:
    top_k = min(top_k, experts)
    tensors = _inputs(tokens, hidden, experts, width, torch.bfloat16, top_k)
    _check(tensors, _ids(tokens, experts, top_k), "native")


@needs_native
def test_native_splits_busy_experts() -> None:
    """More choices than one task takes: their sums over several tasks add up, in one order for any thread count."""
    tensors = _inputs(1300, 32, 4, 16, torch.bfloat16)
    ids = torch.stack((torch.zeros(1300, dtype=torch.int64), torch.arange(1300) % 2 + 2), dim=1)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            results.append(_check(tensors, ids, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_native
def test_native_reads_masters() -> None:
    """Float32 weights give what their bfloat16 copies give, and float32 gradients."""
    tensors = _inputs(150, 24, 3, 20, torch.bfloat16)
    masters = {name: tensor.float() if name in ("gate_up", "down") else tensor for name, tensor in tensors.items()}
    ids, direction = _ids(150, 3), torch.randn(150, 24).bfloat16()
    rounded = _run(moe_experts, tensors, ids, direction, impl="native")
    exact = _run(moe_experts, masters, ids, direction, impl="native")
    for name, tensor in exact.items():
        assert tensor.dtype == masters.get(name, masters["x"]).dtype
        assert torch.equal(tensor.to(rounded[name].dtype), rounded[name]), name


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("favourites", [(0, 1), (3, 4), (4, 0)])
def test_experts_without_tokens(favourites: tuple[int, int], impl: str, dtype: torch.dtype) -> None:
    ids = torch.tensor(favourites).expand(130, 2)
    tensors = _inputs(130, 16, 5, 16, dtype)
    unused = [expert for expert in range(5) if expert not in favourites]
    # Infinite weights of an expert that nobody chose leave no trace.
    tensors["gate_up"][unused] = float("inf") if impl != "reference" else 0.0
    direction = torch.randn_like(tensors["x"])
    found = _run(moe_experts, tensors, ids, direction, impl=impl)
    assert found["output"].isfinite().all() and found["x"].isfinite().all()
    for name in ("gate_up", "down"):
        assert (found[name][unused] == 0).all()
        assert all((found[name][expert] != 0).any() for expert in favourites)


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
def test_no_tokens(impl: str, dtype: torch.dtype) -> None:
    tensors = _inputs(0, 16, 3, 8, dtype)
    found = _run(moe_experts, tensors, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 16), impl=impl)
    assert found["output"].shape == (0, 16)
    assert (found["gate_up"] == 0).all() and (found["down"] == 0).all()


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE[2:])
def test_compiled_as_one_graph(impl: str, dtype: torch.dtype) -> None:
    tensors = _inputs(40, 16, 3, 24, dtype)
    ids, direction = _ids(40, 3), torch.randn(40, 16).to(dtype)
    compiled = torch.compile(moe_experts, backend="aot_eager", fullgraph=True)
    eager = _run(moe_experts, tensors, ids, direction, impl=impl)
    for name, tensor in _run(compiled, tensors, ids, direction, impl=impl).items():
        assert torch.equal(tensor, eager[name]), name


@needs_native
def test_custom_operations() -> None:
    tensors = _inputs(20, 16, 3, 8, torch.bfloat16)
    given_ = tensors["x"], _ids(20, 3), *(tensors[name] for name in NAMES[1:])
    torch.library.opcheck(torch.ops.engram.moe_experts, given_)
    _, *kept = torch.ops.engram.moe_experts(*given_)
    backward = (torch.randn(20, 16).bfloat16(), *(tensors[name] for name in NAMES), *kept)
    torch.library.opcheck(torch.ops.engram.moe_experts_backward, backward)


def test_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the C++ code, bfloat16 runs grouped and says so; asked for by name, it raises."""
    monkeypatch.setattr("engram.kernels.moe_experts.native_obstacle", lambda *_: "of a test")
    tensors = _inputs(9, 16, 3, 8, torch.bfloat16)
    ids, direction = _ids(9, 3), torch.randn(9, 16)
    with caplog.at_level(logging.WARNING):
        found = _run(moe_experts, tensors, ids, direction)
    assert "moe_experts runs on torch's own operations" in caplog.text and "of a test" in caplog.text
    assert torch.equal(found["output"], _run(moe_experts, tensors, ids, direction, impl="grouped")["output"])
    with pytest.raises(ImplementationUnavailable, match="native implementation was asked for, but of a test"):
        _run(moe_experts, tensors, ids, direction, impl="native")
    with pytest.raises(
        ImplementationUnavailable, match="tokens are 20 wide, and it takes widths that are multiples of 16"
    ):
        odd = {name: tensor.float() for name, tensor in _inputs(9, 20, 3, 8).items()}
        _run(moe_experts, odd, ids, torch.randn(9, 20), impl="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": torch.rand(9, 2).double()}, TypeError, "weights float32, not torch.int64 and torch.float64"),
        ({"down": torch.randn(3, 16, 8).double()}, TypeError, "share x's dtype or float32"),
        ({"weights": torch.rand(9, 3)}, ValueError, r"\[9, 16\], \[9, 2\] and \[9, 3\]"),
        ({"down": torch.randn(3, 8, 16)}, ValueError, r"\[3, 8, 16\] for a hidden size of 16"),
        ({"gate_up": torch.randn(3, 2, 8, 32)}, ValueError, r"\[3, 2, 8, 32\] and \[3, 16, 8\]"),
        ({"gate_up": torch.randn(3, 3, 8, 16)}, ValueError, r"\[3, 3, 8, 16\] and \[3, 16, 8\]"),
        (
            {"ids": torch.zeros(9, 0, dtype=torch.int64), "weights": torch.rand(9, 0)},
            ValueError,
            "at least one expert",
        ),
    ],
)
def test_operands_that_do_not_fit(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    tensors = {**_inputs(9, 16, 3, 8), "ids": _ids(9, 3), **changes}
    with pytest.raises(error, match=message):
        moe_experts(tensors["x"], tensors["ids"], *(tensors[name] for name in NAMES[1:]))


@pytest.mark.parametrize(("impl", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("bad", [-1, 3])
def test_a_bad_id_is_named(bad: int, impl: str, dtype: torch.dtype) -> None:
    tensors = _inputs(9, 16, 3, 8, dtype)
    ids = _ids(9, 3)
    ids[4, 1] = bad
    with pytest.raises(IndexError, match=rf"expert id {bad} at \[4, 1\] is not one of 3 experts"):
        moe_experts(tensors["x"], ids, *(tensors[name] for name in NAMES[1:]), impl=impl)


@given(st.integers(1, 150), st.integers(1, 7), st.integers(1, 3))
def test_slots_are_a_padded_grouping(tokens: int, experts: int, top_k: int) -> None:
    ids = torch.randint(0, experts, (tokens, top_k))
    slot_of_choice, choice_of_slot, ends = assign_slots(ids, experts)
    choices = tokens * top_k
    assert torch.equal(choice_of_slot[slot_of_choice], torch.arange(choices))
    assert (choice_of_slot != choices).sum() == choices
    assert (ends.diff() >= 0).all() and (ends % BLOCK == 0).all()
    assert ends[-1] <= len(choice_of_slot) and (choice_of_slot[ends[-1] :] == choices).all()
    expert_of_slot = torch.searchsorted(ends.long(), slot_of_choice, right=True)
    assert torch.equal(expert_of_slot, ids.flatten())
    # Within an expert, tokens keep their order.
    used = choice_of_slot[choice_of_slot != choices]
    for expert in range(experts):
        mine = used[ids.flatten()[used] == expert]
        assert (mine.diff() > 0).all()


def test_unwritten_rows_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products leave rows behind the last group undefined: NaN there must reach nothing."""

    def poisoned(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        product = torch.nn.functional.grouped_mm(a, b, offs=ends)
        if b.dim() == 3:
            product[ends[-1] :] = float("nan")
        return product

    monkeypatch.setattr(grouped, "grouped_product", poisoned)
    _check(_inputs(130, 16, 5, 16), _ids(130, 5), "grouped")
