"""The short causal convolution, seen through modules without a gate whose value is the row itself."""

from typing import Any

import pytest
import torch

from engram.config import MemoryConfig
from engram.memory.engram import Engram
from tests.memory.build import build, memory_config, run_loops
from tests.tolerances import assert_close

WIDTH, STREAMS, ROWS = 3, 2, 40


def row_as_value(conv: dict[str, Any] | None, **changes: Any) -> tuple[Engram, MemoryConfig]:
    """Row t of the table is the value of token t (see `ids`), in every stream."""
    config = memory_config(
        gate=None, conv=conv, num_heads=1, head_dim=WIDTH, **{"max_ngram_size": 2, "rows_per_head": 2, **changes}
    )
    module = build(config, hc_mult=STREAMS, hidden_size=WIDTH, num_rows=ROWS)
    with torch.no_grad():
        module.wkv.weight.zero_()
        module.wkv.weight[-WIDTH:, :WIDTH] = torch.eye(WIDTH)
    return module, config


def ids(length: int, orders: int = 1) -> torch.Tensor:
    return torch.arange(length)[None, :, None].expand(1, length, orders)


def hidden(length: int) -> torch.Tensor:
    return torch.randn(1, length, STREAMS, WIDTH)


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 14])
def test_equals_the_loops(kernel_size: int, dilation: int, length: int) -> None:
    module, config = row_as_value({"kernel_size": kernel_size, "dilation": dilation})
    state = hidden(length)
    output = module(state, ids(length))
    expected, _, leaves = run_loops(module, config, state, ids(length))
    assert_close(output, expected, "conv")
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent.double())
    for name in ("conv.weight", "conv_norm", "embed.weight"):
        actual = module.get_parameter(name).grad
        assert_close(actual, leaves[name].grad, "engram_grad", name=name)


@pytest.mark.parametrize("max_ngram_size", [2, 3, 4])
def test_default_dilation_is_the_longest_ngram(max_ngram_size: int) -> None:
    orders = max_ngram_size - 1
    module, _ = row_as_value({}, max_ngram_size=max_ngram_size, rows_per_head=(2,) * orders)
    module(hidden(14), ids(14, orders))[0, 13].sum().backward()
    touched = module.embed.weight.grad.coalesce()
    sources = touched.indices()[0][touched.values().abs().sum(1) > 0].tolist()
    assert sources == sorted(13 - tap * max_ngram_size for tap in range(4) if tap * max_ngram_size <= 13)


@pytest.mark.parametrize("tap", range(4))
def test_the_last_tap_is_the_current_token(tap: int) -> None:
    module, _ = row_as_value({"kernel_size": 4, "dilation": 2})
    with torch.no_grad():
        module.conv.weight.zero_()
        module.conv.weight[:, 0, tap] = 1.0
        module.conv_norm.fill_(1.0)
    output = module(hidden(12), ids(12)).double()
    value = module.embed.weight.detach()[:12].double()
    normed = value / (value.square().mean(1, keepdim=True) + 1e-5).sqrt()
    branch = normed / (1 + (-normed).exp())
    for position in range(12):
        source = position - (3 - tap) * 2
        expected = value[position] + (branch[source] if source >= 0 else 0)
        assert_close(output[0, position], expected.expand(STREAMS, WIDTH), "conv", name=f"position {position}")


def test_zero_weights_change_nothing() -> None:
    module, _ = row_as_value({})
    with torch.no_grad():
        module.conv.weight.zero_()
    bare, _ = row_as_value(None)
    with torch.no_grad():
        bare.embed.weight.copy_(module.embed.weight)
    state = hidden(12)
    assert torch.equal(module(state, ids(12)), bare(state, ids(12)))


@pytest.mark.parametrize("zero_init", [True, False])
def test_initial_weights(zero_init: bool) -> None:
    config = memory_config(conv={"zero_init": zero_init})
    module = Engram(config, layer_id=1, hidden_size=64, hc_mult=4, num_rows=ROWS)
    weight = module.conv.weight.detach()
    if zero_init:
        assert weight.count_nonzero() == 0
    else:
        # One channel in, four taps: a uniform distribution on +-1/sqrt(4).
        assert 0.45 < float(weight.abs().max()) <= 0.5
        assert abs(float(weight.std()) - 0.5 / 3**0.5) < 0.02


def test_nothing_later_is_read() -> None:
    module, _ = row_as_value({"kernel_size": 5, "dilation": 1})
    for position in range(9):
        module.zero_grad()
        module(hidden(9), ids(9))[0, position].square().sum().backward()
        sources = module.embed.weight.grad.to_dense().abs().sum(1).nonzero().flatten().tolist()
        assert sources == list(range(max(0, position - 4), position + 1))


def test_channels_and_streams_do_not_mix() -> None:
    module, _ = row_as_value({"kernel_size": 2, "dilation": 1})
    module(hidden(6), ids(6))[0, :, 1, 2].square().sum().backward()
    # Channel 2 of stream 1, of two streams of three channels.
    assert module.conv.weight.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [5]
    assert module.conv_norm.grad.nonzero().tolist() == [[1, 2]]


def test_the_norm_has_its_own_epsilon() -> None:
    module, config = row_as_value({}, conv_norm_eps=1e-5, norm_eps=10.0)
    with torch.no_grad():
        module.embed.weight.mul_(1e-3)
    state = hidden(9)
    output = module(state, ids(9))
    expected, _, _ = run_loops(module, config, state, ids(9))
    # At this size the epsilon decides the result: a wrong one shows in the first digit.
    assert_close(output, expected, "conv")


def test_bfloat16() -> None:
    module, config = row_as_value({})
    state = hidden(14).bfloat16()
    output = module(state, ids(14))
    expected, _, _ = run_loops(module, config, state, ids(14))
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, "conv", dtype=torch.bfloat16)
