"""Routed experts in Triton: in its interpreter on CPU (float32), and on a GPU where there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.moe_experts.reference import moe_experts_ref
from engram.kernels.moe_experts.triton import moe_experts_triton
from engram.kernels.moe_experts.triton_routing import route
from tests.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weights", "gate_up", "down")


def _inputs(tokens: int, hidden: int, experts: int, width: int, top_k: int) -> dict[str, Tensor]:
    inputs = {
        "x": torch.randn(tokens, hidden),
        "weights": torch.rand(tokens, top_k),
        "gate_up": torch.randn(experts, 2, width, hidden) / hidden**0.5,
        "down": torch.randn(experts, hidden, width) / width**0.5,
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def _ids(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).topk(top_k).indices.to(DEVICE)


def _run(function, inputs: dict[str, Tensor], ids: Tensor, direction: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(leaves["x"], ids, leaves["weights"], leaves["gate_up"], leaves["down"])
    gradients = torch.autograd.grad(y, [leaves[name] for name in NAMES], direction.to(y.dtype))
    return {"output": y.detach(), **dict(zip(NAMES, gradients, strict=True))}


def _check(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    direction = torch.randn_like(inputs["x"])
    actual = _run(moe_experts_triton, inputs, ids, direction)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    expected = _run(moe_experts_ref, exact, ids, direction)
    for name, want in expected.items():
        assert actual[name].dtype == inputs.get(name, inputs["x"]).dtype
        assert_close(actual[name], want, "moe_experts_triton", name=name, dtype=inputs["x"].dtype)
    return actual


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "width", "top_k"),
    [
        (1, 16, 1, 16, 1),
        # Widths of no whole tile, and experts of no whole tile.
        (23, 48, 5, 80, 2),
        (9, 192, 3, 96, 3),
        # An average share of more than 16 tokens: larger tiles.
        (75, 32, 2, 48, 1),
    ],
)
def test_output_and_gradients_equal_the_reference(
    tokens: int, hidden: int, experts: int, width: int, top_k: int
) -> None:
    _check(_inputs(tokens, hidden, experts, width, top_k), _ids(tokens, experts, top_k))


@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=20))
def test_any_routing(choices: list[list[int]]) -> None:
    """All tokens to one expert, an expert twice for one token, and ids of no expert (-1 and 4 here) alike."""
    ids = torch.tensor(choices, device=DEVICE)
    actual = _check(_inputs(len(ids), 16, 4, 16, 2), ids)
    unused = [expert for expert in range(4) if not (ids == expert).any()]
    assert (actual["gate_up"][unused] == 0).all() and (actual["down"][unused] == 0).all()
    assert (actual["weights"][(ids < 0) | (ids >= 4)] == 0).all()


@pytest.mark.parametrize(("num_choices", "num_experts", "tile_rows"), [(2500, 6, 16), (1030, 300, 32), (5, 64, 128)])
def test_routing_is_a_stable_sort(num_choices: int, num_experts: int, tile_rows: int) -> None:
    ids = torch.randint(0, num_experts, (num_choices, 1), device=DEVICE)
    routing = route(ids, num_experts, tile_rows)
    order = torch.argsort(ids.flatten(), stable=True)
    assert routing.choice_of_row.equal(order.int())
    assert routing.row_of_choice.equal(torch.argsort(order).int())
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    assert routing.starts.equal(starts.int())
    expected = [
        [expert, row]
        for expert in range(num_experts)
        for row in range(int(starts[expert]), int(starts[expert + 1]), tile_rows)
    ]
    tiles = routing.tiles[: num_choices // tile_rows + num_experts].tolist()
    assert tiles[: len(expected)] == expected
    assert all(expert == -1 for expert, _ in tiles[len(expected) :])


def test_no_tokens() -> None:
    actual = _run(
        moe_experts_triton, _inputs(0, 16, 3, 32, 2), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 16)
    )
    assert actual["output"].shape == actual["x"].shape == (0, 16) and actual["weights"].shape == (0, 2)
    assert (actual["gate_up"] == 0).all() and (actual["down"] == 0).all()


def test_it_repeats_bitwise_and_leaves_its_inputs_alone() -> None:
    inputs, ids, direction = _inputs(19, 32, 4, 16, 2), _ids(19, 4, 2), torch.randn(19, 32, device=DEVICE)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    first, second = (_run(moe_experts_triton, inputs, ids, direction) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    assert all(inputs[name].equal(before[name]) for name in inputs)


def test_inputs_need_not_be_contiguous() -> None:
    inputs, ids = _inputs(7, 32, 3, 16, 2), _ids(7, 3, 2)
    strided = {name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for name, tensor in inputs.items()}
    tensors = [inputs["x"], ids, inputs["weights"], inputs["gate_up"], inputs["down"]]
    others = [strided["x"], ids.t().contiguous().t(), strided["weights"], strided["gate_up"], strided["down"]]
    assert moe_experts_triton(*tensors).equal(moe_experts_triton(*others))


def test_nothing_is_kept_without_gradients() -> None:
    inputs, ids = _inputs(7, 32, 3, 16, 2), _ids(7, 3, 2)
    arguments = (inputs["x"], ids, inputs["weights"], inputs["gate_up"], inputs["down"])
    assert torch.ops.engram.moe_experts_triton(*arguments, False)[1].numel() == 0
    assert torch.ops.engram.moe_experts_triton(*arguments, True)[1].shape == (14, 2, 16)


def test_registration() -> None:
    inputs, ids = _inputs(7, 32, 3, 16, 2), _ids(7, 3, 2)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    arguments = (leaves[0], ids, *leaves[1:], True)
    torch.library.opcheck(torch.ops.engram.moe_experts_triton.default, arguments)
    with torch.no_grad():
        y, kept, *routing = torch.ops.engram.moe_experts_triton(*arguments)
        arguments = (y, leaves[0], *leaves[1:], kept, routing)
        torch.library.opcheck(torch.ops.engram.moe_experts_triton_backward.default, arguments)


def test_compiled_graphs_hold_it() -> None:
    inputs, direction = _inputs(7, 32, 3, 16, 2), torch.randn(7, 32, device=DEVICE)
    compiled = torch.compile(lambda *a: moe_experts_triton(*a) * 2, fullgraph=True, backend="aot_eager")
    for ids in (_ids(7, 3, 2), _ids(7, 3, 2)):
        actual = _run(compiled, inputs, ids, direction)
        expected = _run(lambda *a: moe_experts_triton(*a) * 2, inputs, ids, direction)
        assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 192, 32, 96, 2), (3000, 512, 7, 208, 6)])
def test_on_a_gpu(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    tokens, _, experts, _, top_k = shape
    inputs = {name: t if name == "weights" else t.to(dtype) for name, t in _inputs(*shape).items()}
    _check(inputs, _ids(tokens, experts, top_k))


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    inputs, ids, direction = _inputs(500, 64, 8, 32, 2), _ids(500, 8, 2), torch.randn(500, 64, device=DEVICE)
    _run(moe_experts_triton, inputs, ids, direction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(moe_experts_triton, inputs, ids, direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
