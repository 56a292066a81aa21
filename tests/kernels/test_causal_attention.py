import pytest
import torch

from engram.kernels import causal_attention as module
from engram.kernels.causal_attention import blocks, causal_attention, causal_attention_ref


def _inputs(length: int, value_width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, width, dtype=dtype).requires_grad_() for width in (12, 12, value_width)]


def _by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for t in range(q.shape[2]):
                seen = [s for s in range(t + 1) if mask is None or mask[b, 0, t, s]]
                weights = torch.stack([(q[b, h, t].double() @ k[b, h, s].double()) * 0.3 for s in seen]).softmax(0)
                out[b, h, t] = sum(w * v[b, h, s].double() for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("value_width", [7, 12, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_all_ways_equal_loops(monkeypatch: pytest.MonkeyPatch, value_width: int, masked: bool) -> None:
    inputs = _inputs(9, value_width)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9])
    same = (documents.unsqueeze(1) == documents.unsqueeze(2)).tril().unsqueeze(1)
    mask = same if masked else None
    expected = _by_loops(*inputs, mask)
    direction = torch.randn_like(expected)
    gradients = []
    # Blocks that do not divide the length.
    monkeypatch.setattr(blocks, "BLOCK", 4)
    for function in (causal_attention, causal_attention_ref, blocks.causal_attention_blocks):
        out = function(*inputs, mask, 0.3)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
        gradients.append(torch.autograd.grad(out, inputs, direction.float()))
    for name, fused, explicit, blocked in zip("qkv", *gradients, strict=True):
        for actual in (fused, blocked):
            torch.testing.assert_close(actual, explicit, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [module.SHORT, module.SHORT + 1])
def test_compiled_choice_equals_eager(length: int) -> None:
    inputs = _inputs(length, 8)
    compiled = torch.compile(causal_attention, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*inputs, None, 0.3), causal_attention(*inputs, None, 0.3), atol=1e-5, rtol=1e-5)
