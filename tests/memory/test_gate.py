"""The gate: every form of the equation, its extremes, and that it is computed in float32 whatever comes in.

The modules here have one head whose row is the key of every stream (times `KEY_SCALES`) and the value, so that keys and
values are known exactly.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import MemoryConfig
from engram.memory.engram import Engram
from tests.memory.build import build, memory_config, random_ids, run_loops
from tests.tolerances import assert_close

WIDTH = 5
# Powers of two, exact in bfloat16; a gate that mixed up two streams would show.
KEY_SCALES = (1.0, -2.0, 0.5)
STREAMS = len(KEY_SCALES)


def one_head(rows: list[list[float]], **changes: Any) -> tuple[Engram, MemoryConfig]:
    """Key of stream g = KEY_SCALES[g] * row, value = 4 * row, unit gains."""
    config = memory_config(max_ngram_size=2, num_heads=1, head_dim=WIDTH, rows_per_head=2, conv=None, **changes)
    module = build(config, hc_mult=STREAMS, hidden_size=WIDTH, num_rows=len(rows))
    with torch.no_grad():
        module.embed.weight.copy_(torch.tensor(rows))
        module.wkv.weight.copy_(torch.cat([scale * torch.eye(WIDTH) for scale in (*KEY_SCALES, 4.0)]))
        for gain in (module.q_weight, module.k_weight):
            gain.fill_(0.0 if config.zero_centred_gains else 1.0)
    return module, config


def all_ids(count: int) -> torch.Tensor:
    return torch.arange(count)[None, :, None]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain"])
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("eps", [1e-20, 1e-6, 0.3])
def test_gates_equal_the_loops(gate: str, zero_centred: bool, eps: float) -> None:
    config = memory_config(gate=gate, zero_centred_gains=zero_centred, norm_eps=eps, projection_bias=True)
    module = build(config, hidden_size=7)
    hidden, ids = torch.randn(2, 13, 4, 7), random_ids(config, 2, 13)
    gates = module.gates(hidden, ids)
    _, expected, _ = run_loops(module, config, hidden, ids)
    assert gates.dtype == torch.float32
    assert_close(gates, expected, "gate")


def test_the_score_by_hand() -> None:
    module, _ = one_head([[3.0, 0.0, 4.0, 0.0, 0.0]], norm_eps=1e-30)
    hidden = torch.tensor([1.0, 2.0, 2.0, 0.0, 0.0]).expand(1, 1, STREAMS, WIDTH)
    # |h| = 3, |k| = 5, h.k = 11: score = sqrt(5) * 11/15, and its sign follows the key's.
    score = math.sqrt(5) * 11 / 15
    expected = [sigmoid(math.copysign(math.sqrt(score), scale)) for scale in KEY_SCALES]
    assert_close(module.gates(hidden, all_ids(1)), [[expected]], "gate")
    value = [[[[4 * alpha * x for x in (3.0, 0.0, 4.0, 0.0, 0.0)] for alpha in expected]]]
    assert_close(module(hidden, all_ids(1)), value, "engram")
    plain, _ = one_head([[3.0, 0.0, 4.0, 0.0, 0.0]], norm_eps=1e-30, gate="plain")
    expected = [sigmoid(math.copysign(score, scale)) for scale in KEY_SCALES]
    assert_close(plain.gates(hidden, all_ids(1)), [[expected]], "gate")


def test_without_a_gate_every_stream_takes_the_value() -> None:
    rows = [[1.0, -2.0, 3.0, -4.0, 5.0], [0.0] * WIDTH]
    module, _ = one_head([[0.0] * WIDTH] * 2, gate=None)
    with torch.no_grad():
        module.embed.weight.copy_(torch.tensor(rows))
    output = module(torch.randn(1, 2, STREAMS, WIDTH), all_ids(2))
    assert output.tolist() == [[[[4 * x for x in row]] * STREAMS for row in rows]]


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain"])
def test_bfloat16_inputs_are_gated_in_float32(gate: str) -> None:
    rows = torch.randn(17, WIDTH).bfloat16().float()
    module, config = one_head(rows.tolist(), gate=gate)
    hidden = torch.randn(1, 17, STREAMS, WIDTH).bfloat16()
    gates = module.gates(hidden, all_ids(17))
    _, expected, _ = run_loops(module, config, hidden, all_ids(17))
    assert gates.dtype == torch.float32
    # Keys are exact here: rounding anything to bfloat16 on the way would cost three digits.
    assert_close(gates, expected, "gate", dtype=torch.bfloat16)


ZERO = [0.0] * WIDTH
ONES = [1.0, -1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize(("row", "state"), [(ZERO, ONES), (ONES, ZERO), (ZERO, ZERO)])
@pytest.mark.parametrize("eps", [1e-20, 1e-6])
def test_zero_vectors_leave_the_gate_half_open(row: list[float], state: list[float], eps: float) -> None:
    module, _ = one_head([row], norm_eps=eps)
    hidden = torch.tensor(state).expand(1, 1, STREAMS, WIDTH).clone().requires_grad_()
    gates = module.gates(hidden, all_ids(1))
    # The score is 0 of either sign, its magnitude is held at 1e-6: 0.5 +- 0.00025.
    assert ((gates - 0.5).abs() - 0.00025).abs().max() < 1e-6
    output = module(hidden, all_ids(1))
    output.sum().backward()
    assert output.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad.to_dense().isfinite().all(), name
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_blind_to_scale(scale: float, dtype: torch.dtype) -> None:
    module, _ = one_head([ONES, [2.0, 1.0, 0.0, -1.0, 0.5]], norm_eps=1e-20)
    hidden = torch.randn(1, 2, STREAMS, WIDTH).to(dtype)
    gates = module.gates(hidden, all_ids(2))
    scaled = module.gates((hidden.double() * 2.0 ** round(math.log2(scale))).to(dtype), all_ids(2))
    assert_close(scaled, gates.double(), "gate")
    with torch.no_grad():
        module.embed.weight *= 2.0 ** round(math.log2(scale))
    assert_close(module.gates(hidden, all_ids(2)), gates.double(), "gate")


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_huge_and_tiny_values_stay_finite(size: float) -> None:
    module, _ = one_head([[size * x for x in ONES]], norm_eps=1e-6)
    hidden = (size * torch.randn(1, 1, STREAMS, WIDTH)).requires_grad_()
    gates = module.gates(hidden, all_ids(1))
    assert ((gates > 0) & (gates < 1)).all()
    output = module(hidden, all_ids(1))
    output.backward(torch.full_like(output, 1e-3))
    assert output.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert module.embed.weight.grad.to_dense().isfinite().all()


def test_aligned_vectors_reach_the_ends_of_the_range() -> None:
    module, _ = one_head([ONES], norm_eps=1e-30)
    aligned = module.gates(torch.tensor(ONES).expand(1, 1, STREAMS, WIDTH) * 7, all_ids(1))
    expected = [sigmoid(math.copysign(WIDTH**0.25, scale)) for scale in KEY_SCALES]
    assert_close(aligned, [[expected]], "gate")


def test_gradient_at_score_zero_is_zero_and_not_infinite() -> None:
    # The derivative of sqrt at 0 is infinite; below the floor of 1e-6 the gate is constant.
    module, _ = one_head([[1.0, 1.0, 0.0, 0.0, 0.0]])
    hidden = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]).expand(1, 1, STREAMS, WIDTH).clone().requires_grad_()
    gates = module.gates(hidden, all_ids(1))
    assert ((gates - 0.5).abs() < 0.001).all()
    module(hidden, all_ids(1)).sum().backward()
    assert hidden.grad.count_nonzero() == 0
    assert module.q_weight.grad.count_nonzero() == 0
    assert module.k_weight.grad.count_nonzero() == 0
    # Keys learn nothing, the value does.
    assert module.wkv.weight.grad[: STREAMS * WIDTH].count_nonzero() == 0
    assert module.wkv.weight.grad[STREAMS * WIDTH :].isfinite().all()
    assert module.wkv.weight.grad[STREAMS * WIDTH :].count_nonzero() > 0


@pytest.mark.parametrize(("tilt", "moves"), [(2e-5, True), (2e-7, False)])
def test_gradient_on_both_sides_of_the_floor(tilt: float, moves: bool) -> None:
    module, config = one_head([[1.0, 1.0, 0.0, 0.0, 0.0]])
    hidden = torch.tensor([1.0, -1.0 + tilt, 0.0, 0.0, 0.0]).expand(1, 1, STREAMS, WIDTH).clone().requires_grad_()
    module(hidden, all_ids(1)).sum().backward()
    expected, _, leaves = run_loops(module, config, hidden, all_ids(1))
    expected.sum().backward()
    assert bool(hidden.grad.count_nonzero()) == moves
    if moves:
        # The derivative of the square root magnifies the rounding of the score, which is itself a difference of ones.
        error = (hidden.grad.double() - leaves["hidden"].grad).abs().max()
        assert error <= 1e-2 * leaves["hidden"].grad.abs().max()


def test_the_sign_of_the_score_decides_the_side() -> None:
    module, config = one_head(torch.randn(50, WIDTH).tolist())
    hidden = torch.randn(1, 50, STREAMS, WIDTH)
    gates = module.gates(hidden, all_ids(50))[0]
    rows = module.embed.weight.detach()[:, None] * torch.tensor(KEY_SCALES)[:, None]
    assert torch.equal(gates > 0.5, (hidden[0] * rows).sum(-1) > 0)


def test_only_the_product_of_the_two_gains_counts() -> None:
    config = memory_config(conv=None)
    module, hidden, ids = build(config), torch.randn(1, 9, 4, 5), random_ids(config, 1, 9)
    gates = module.gates(hidden, ids)
    with torch.no_grad():
        q, k = module.q_weight.clone(), module.k_weight.clone()
        module.q_weight.copy_(q * k)
        module.k_weight.fill_(1.0)
    assert_close(module.gates(hidden, ids), gates.double(), "gate")


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain", None])
@pytest.mark.parametrize("bias", [0.0, 3.0, math.inf, math.nan])
def test_dead_tokens_write_nothing_whatever_the_value(bias: float, gate: str | None) -> None:
    # A gate of zero does not silence infinity: 0 * inf is NaN. The value must be selected away.
    module, _ = one_head([[math.inf] * WIDTH, ONES, [math.nan] * WIDTH], projection_bias=True, gate=gate)
    with torch.no_grad():
        module.wkv.bias.fill_(bias)
    hidden = torch.randn(1, 3, STREAMS, WIDTH, requires_grad=True)
    ids = torch.tensor([[[-1], [1], [-1]]])
    output = module(hidden, ids)
    assert output[0, [0, 2]].tolist() == torch.zeros(2, STREAMS, WIDTH).tolist()
    assert module.gates(hidden, ids)[0, [0, 2]].tolist() == [[0.0] * STREAMS] * 2
    if math.isfinite(bias):
        assert (output[0, 1] != 0).any()
        output.sum().backward()
        if gate is not None:
            assert hidden.grad[0, [0, 2]].count_nonzero() == 0
            assert hidden.grad.isfinite().all()
        # Two of three tokens are dead: the value's bias hears of one token's gates only.
        gates = module.gates(hidden, ids)[0, 1].sum().expand(WIDTH)
        assert_close(module.wkv.bias.grad[-WIDTH:], gates.double(), "engram_grad")
        assert module.embed.weight.grad.coalesce().indices().tolist() == [[1]]


def test_a_dead_token_leaves_its_neighbours_alone() -> None:
    config = memory_config(conv=None, projection_bias=True)
    module, hidden, ids = build(config), torch.randn(1, 5, 4, 5), random_ids(config, 1, 5)
    whole = module(hidden, ids)
    ids[0, 2] = -1
    holed = module(hidden, ids)
    assert holed[0, 2].count_nonzero() == 0
    assert torch.equal(holed[0, [0, 1, 3, 4]], whole[0, [0, 1, 3, 4]])


@given(st.lists(st.floats(-100, 100, width=32), min_size=WIDTH, max_size=WIDTH), st.integers(0, 2**16))
def test_gates_lie_strictly_between_the_ends(row: list[float], seed: int) -> None:
    module, config = one_head([row])
    hidden = torch.randn(1, 1, STREAMS, WIDTH, generator=torch.Generator().manual_seed(seed))
    gates = module.gates(hidden, all_ids(1))
    # |score| <= sqrt(D) by Cauchy and Schwarz, so a gate never saturates.
    bound = sigmoid(WIDTH**0.25) + 1e-6
    assert ((gates >= 1 - bound) & (gates <= bound)).all()
    _, expected, _ = run_loops(module, config, hidden, all_ids(1))
    assert (gates.double() - expected).abs().max() < 1e-3
