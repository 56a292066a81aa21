"""The whole module against the loops: every variant, every gradient, both dtypes, and what may depend on what."""

from typing import Any

import numpy as np
import pytest
import torch

from engram.memory.engram import Engram
from engram.memory.hashing import NgramHash
from tests.memory.build import ROWS, VARIANTS, WIDTH, build, compare_with_loops, memory_config, random_ids, run_loops
from tests.reference import engram_loops as loops
from tests.tolerances import assert_close

CASES = [(name, streams) for name in VARIANTS for streams in ((1,) if name == "single" else (1, 4))]


@pytest.mark.parametrize(("variant", "streams"), CASES)
def test_output_and_gradients(variant: str, streams: int) -> None:
    config = memory_config(**VARIANTS[variant])
    module = build(config, hc_mult=streams)
    compare_with_loops(module, config, torch.randn(2, 11, streams, WIDTH), random_ids(config, 2, 11))


@pytest.mark.parametrize(("variant", "streams"), CASES)
def test_bfloat16_keeps_to_the_loops(variant: str, streams: int) -> None:
    config = memory_config(**VARIANTS[variant])
    module = build(config, hc_mult=streams)
    hidden, ids = torch.randn(1, 200, streams, WIDTH).bfloat16(), random_ids(config, 1, 200)
    # Near a score of 0 the square root turns the rounding of a key into any gate: such tokens say nothing.
    _, gates, _ = run_loops(module, config, hidden, ids)
    steep = (gates[0] - 0.5).abs() < (0.1 if config.gate == "signed_sqrt" else 0)
    clear = (~steep.any(dim=1)).nonzero().flatten()[:18]
    compare_with_loops(module, config, hidden[0, clear].unflatten(0, (2, 9)), ids[0, clear].unflatten(0, (2, 9)))


@pytest.mark.parametrize(("batch", "length", "streams", "width"), [(1, 1, 1, 2), (3, 2, 2, 7), (1, 17, 3, 13)])
def test_odd_sizes(batch: int, length: int, streams: int, width: int) -> None:
    config = memory_config(num_heads=3, head_dim=1)
    module = build(config, hc_mult=streams, hidden_size=width)
    compare_with_loops(module, config, torch.randn(batch, length, streams, width), random_ids(config, batch, length))


@pytest.mark.parametrize("variant", ["paper", "v4_1", "demo"])
def test_dead_tokens(variant: str) -> None:
    config = memory_config(**VARIANTS[variant])
    module, ids = build(config), random_ids(config, 2, 9)
    ids[0, 3] = ids[1, 0] = ids[1, 8] = -1
    compare_with_loops(module, config, torch.randn(2, 9, 4, WIDTH), ids)


def test_parameters_have_the_agreed_names_and_shapes() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in build(memory_config()).named_parameters()}
    assert shapes == {
        "embed.weight": (ROWS, 3),
        "wkv.weight": (5 * WIDTH, 12),
        "q_weight": (4, WIDTH),
        "k_weight": (4, WIDTH),
        "conv.weight": (4 * WIDTH, 1, 4),
        "conv_norm": (4, WIDTH),
    }
    bare = build(memory_config(conv=None, projection_bias=True), hc_mult=1)
    assert {name: tuple(parameter.shape) for name, parameter in bare.named_parameters()} == {
        "embed.weight": (ROWS, 3),
        "wkv.weight": (2 * WIDTH, 12),
        "wkv.bias": (2 * WIDTH,),
        "q_weight": (1, WIDTH),
        "k_weight": (1, WIDTH),
    }
    assert all(parameter.dtype == torch.float32 for parameter in bare.parameters())


def test_projection_holds_the_keys_of_each_stream_and_then_the_value() -> None:
    config = memory_config(**VARIANTS["no_conv"])
    module, ids, hidden = build(config), random_ids(config, 1, 3), torch.randn(1, 3, 4, WIDTH)
    gates, output = module.gates(hidden, ids), module(hidden, ids)
    with torch.no_grad():
        module.wkv.weight[2 * WIDTH : 3 * WIDTH] *= -1
    # The key of stream 2 turned round: its gate goes to 1 minus itself, the others stay.
    turned = module.gates(hidden, ids)
    assert_close(turned[..., 2], 1 - gates[..., 2].double(), "gate")
    assert torch.equal(turned[..., [0, 1, 3]], gates[..., [0, 1, 3]])
    with torch.no_grad():
        module.wkv.weight[2 * WIDTH : 3 * WIDTH] *= -1
        module.wkv.weight[4 * WIDTH :] *= 2
    assert_close(module(hidden, ids), 2 * output.double(), "engram")


def test_a_new_module_writes_its_gated_value_alone() -> None:
    config = memory_config()
    module = Engram(config, layer_id=1, hidden_size=WIDTH, hc_mult=4, num_rows=ROWS)
    assert module.conv.weight.count_nonzero() == 0
    hidden, ids = torch.randn(2, 12, 4, WIDTH), random_ids(config, 2, 12)
    output = module(hidden, ids)
    _, gates, _ = run_loops(module, config, hidden, ids)
    values = module.embed.weight[ids].flatten(-2).double() @ module.wkv.weight[-WIDTH:].double().T
    assert_close(output, gates[..., None].double() * values[:, :, None], "engram")
    # Zero convolution weights still learn: no gradient is zero.
    output.square().sum().backward()
    assert module.conv.weight.grad.abs().min() > 0


def test_new_modules_start_from_neutral_gains() -> None:
    for zero_centred, neutral in ((False, 1.0), (True, 0.0)):
        config = memory_config(zero_centred_gains=zero_centred, projection_bias=True, init_std=0.5, head_dim=40)
        module = Engram(config, layer_id=1, hidden_size=WIDTH, hc_mult=2, num_rows=500)
        for gain in (module.q_weight, module.k_weight, module.conv_norm):
            assert torch.equal(gain, torch.full_like(gain, neutral))
        assert module.wkv.bias.count_nonzero() == 0
        assert abs(float(module.embed.weight.detach().std()) - 0.5) < 0.02
        assert torch.isfinite(module.wkv.weight).all()
        assert module.wkv.weight.detach().std() > 0


def test_causality_by_gradient() -> None:
    config = memory_config()
    module = build(config)
    hidden = torch.randn(1, 11, 4, WIDTH, requires_grad=True)
    # Row t of the table belongs to token t alone, so its gradient shows what reads token t.
    ids = torch.arange(11)[None, :, None].expand(1, 11, 4)
    for position in (0, 4, 10):
        module.zero_grad()
        hidden.grad = None
        module(hidden, ids)[0, position].square().sum().backward()
        reads_hidden = hidden.grad[0].abs().sum((1, 2)).nonzero().flatten().tolist()
        reads_rows = module.embed.weight.grad.to_dense().abs().sum(1).nonzero().flatten().tolist()
        # Four taps, three tokens apart, ending at the current token.
        assert reads_hidden == reads_rows == [source for source in range(11) if position - source in (0, 3, 6, 9)]


def test_streams_share_the_value_and_nothing_else() -> None:
    config = memory_config()
    module, ids = build(config), random_ids(config, 1, 8)
    hidden = torch.randn(1, 8, 4, WIDTH, requires_grad=True)
    module(hidden, ids)[:, :, 1].square().sum().backward()
    assert hidden.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [1]
    assert module.q_weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1]
    used = module.wkv.weight.grad.unflatten(0, (5, WIDTH)).abs().sum((1, 2)).nonzero().flatten().tolist()
    assert used == [1, 4]


def test_a_prefix_has_the_outputs_of_the_whole() -> None:
    config = memory_config()
    module, ids, hidden = build(config), random_ids(config, 2, 13), torch.randn(2, 13, 4, WIDTH)
    whole = module(hidden, ids)
    for length in (1, 6, 12):
        assert_close(module(hidden[:, :length], ids[:, :length]), whole[:, :length].double(), "engram")


def test_rows_of_a_batch_do_not_meet() -> None:
    config = memory_config()
    module, ids, hidden = build(config), random_ids(config, 3, 7), torch.randn(3, 7, 4, WIDTH)
    whole = module(hidden, ids)
    for row in range(3):
        assert_close(module(hidden[row : row + 1], ids[row : row + 1]), whole[row : row + 1].double(), "engram")


def test_tokens_to_output_end_to_end() -> None:
    """Packed documents with a dead token: the expected output comes from the loops alone, hash included."""
    config = memory_config(num_heads=2, rows_per_head=(11, 5), seed=3, projection_bias=True)
    hasher = NgramHash(
        vocabulary_size=17,
        layer_ids=[1],
        max_ngram_size=3,
        num_heads=2,
        rows_per_head=[11, 5],
        pad_id=2,
        seed=3,
    )
    tokens = [4, 9, 9, 16, 0, 4, 9, -1, 9, 9, 16]
    documents = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    primes = loops.distinct_primes(1, 2, [11, 5])[0]
    expected_ids = loops.add_offsets(
        loops.hash_ids(tokens, loops.pcg64_multipliers(1, 3, 17, 3), primes, 2, "segment", documents), primes
    )
    module = build(config, num_rows=hasher.num_rows[1])
    hidden = torch.randn(1, 11, 4, WIDTH)
    parameters = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}
    expected, _ = loops.engram(hidden.double().numpy(), [expected_ids], parameters)
    output = module(hidden, hasher(torch.tensor([tokens]), torch.tensor([documents]))[1])
    assert_close(output, np.array(expected), "engram")


def test_a_meta_module_of_production_size_takes_no_memory() -> None:
    config = memory_config(
        max_ngram_size=4, num_heads=8, head_dim=256, rows_per_head=16_000_000, conv=None, norm_eps=1e-20
    )
    with torch.device("meta"):
        module = Engram(config, layer_id=1, hidden_size=5120, hc_mult=4, num_rows=384_006_168)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.embed.weight.numel() == 384_006_168 * 256
    assert tuple(module.wkv.weight.shape) == (25_600, 6_144)
    assert not list(module.buffers())
    hidden = torch.empty(1, 3, 4, 5120, device="meta")
    assert module(hidden, torch.zeros(1, 3, 24, dtype=torch.int64, device="meta")).shape == hidden.shape


def test_a_compiled_module_computes_the_same() -> None:
    config = memory_config()
    module = build(config)
    hidden, ids = torch.randn(2, 9, 4, WIDTH), random_ids(config, 2, 9)
    ids[1, 2] = -1
    results: list[dict[str, Any]] = []
    cotangent = torch.randn_like(hidden)
    for function in (module, torch.compile(module)):
        module.zero_grad()
        leaf = hidden.clone().requires_grad_()
        output = function(leaf, ids)
        output.backward(cotangent)
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        results.append({"output": output.detach(), "hidden": leaf.grad, **gradients})
    eager, compiled = results
    assert eager.keys() == compiled.keys()
    for name, expected in eager.items():
        assert_close(compiled[name], expected.to_dense(), "engram_grad", name=name)
