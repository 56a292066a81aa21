import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.kernels.moe_experts import grouped, moe_experts, moe_experts_ref
from engram.kernels.moe_experts.grouped import BLOCK, assign_slots

NAMES = ("x", "weights", "gate_up", "down")


def _inputs(tokens: int, hidden: int, experts: int, width: int, dtype: torch.dtype = torch.float32) -> dict:
    return {
        "x": torch.randn(tokens, hidden, dtype=dtype),
        "weights": torch.rand(tokens, 2),
        "gate_up": torch.randn(experts, 2, width, hidden, dtype=dtype) / hidden**0.5,
        "down": torch.randn(experts, hidden, width, dtype=dtype) / width**0.5,
    }


def _check(tensors: dict, ids: torch.Tensor, tolerance: float) -> None:
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    reference = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    actual = moe_experts(ours["x"], ids, ours["weights"], ours["gate_up"], ours["down"])
    expected = moe_experts_ref(reference["x"], ids, reference["weights"], reference["gate_up"], reference["down"])
    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, [ours[name] for name in NAMES], direction)
    expected_gradients = torch.autograd.grad(expected, [reference[name] for name in NAMES], direction.double())
    for name, got, want in zip(("output", *NAMES), (actual, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == (ours[name].dtype if name in ours else actual.dtype)
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("tokens", [1, 63, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2)])
def test_outputs_and_gradients_equal_the_reference(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    ids = torch.rand(tokens, 5).topk(2).indices
    for hidden, width in ((24, 40), (10, 7)):
        _check(_inputs(tokens, hidden, 5, width, dtype), ids, tolerance)


@pytest.mark.parametrize("favourites", [(0, 1), (3, 4), (4, 0)])
def test_experts_without_tokens(favourites: tuple[int, int]) -> None:
    ids = torch.tensor(favourites).expand(130, 2)
    tensors = _inputs(130, 16, 5, 16)
    _check(tensors, ids, 3e-6)
    gate_up = tensors["gate_up"].requires_grad_()
    moe_experts(tensors["x"], ids, tensors["weights"], gate_up, tensors["down"]).square().sum().backward()
    unused = [expert for expert in range(5) if expert not in favourites]
    assert (gate_up.grad[unused] == 0).all()
    assert (gate_up.grad[list(favourites)] != 0).any()


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

    def poisoned(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        product = torch.nn.functional.grouped_mm(a, b, offs=ends)
        if b.dim() == 3:
            product[ends[-1] :] = float("nan")
        return product

    monkeypatch.setattr(grouped, "grouped_product", poisoned)
    _check(_inputs(130, 16, 5, 16), torch.rand(130, 5).topk(2).indices, 3e-6)


def test_padding_cannot_leak() -> None:
    """Infinite weights of an expert that nobody chose leave no trace."""
    tensors = _inputs(10, 16, 3, 16)
    tensors["gate_up"][1] = float("inf")
    ids = torch.tensor([0, 2]).expand(10, 2)
    assert moe_experts(tensors["x"], ids, tensors["weights"], tensors["gate_up"], tensors["down"]).isfinite().all()
