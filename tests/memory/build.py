"""Small modules with random parameters, and their comparison with the loops, output and each gradient by name."""

from typing import Any

import torch

from engram.config import MemoryConfig
from engram.memory.engram import Engram
from engram.memory.presets import preset
from tests.reference import engram_loops as loops
from tests.tolerances import assert_close

WIDTH = 5
ROWS = 29

# What the published variants and the ablations change, and the number of streams.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {**preset("paper"), "num_heads": 2},
    "v4_1": {**preset("v4_1"), "num_heads": 2, "rows_per_head": (7, 7, 7)},
    "ple": {**preset("ple"), "num_heads": 2},
    "demo": {"projection_bias": True, "conv": {"zero_init": False}},
    "plain_gate": {"gate": "plain"},
    "no_gate": {"gate": None},
    "no_conv": {"conv": None},
    "no_gate_no_conv": {"gate": None, "conv": None, "projection_bias": True},
    "odd_conv": {"conv": {"kernel_size": 3, "dilation": 2}, "conv_norm_eps": 1e-2, "norm_eps": 1e-1},
    "single": {"fusion": "single"},
}


def memory_config(**changes: Any) -> MemoryConfig:
    return MemoryConfig(**{"layer_ids": (1,), "num_heads": 2, "head_dim": 3, "rows_per_head": (7, 7), **changes})


def build(config: MemoryConfig, *, hc_mult: int = 4, hidden_size: int = WIDTH, num_rows: int = ROWS) -> Engram:
    """A module whose parameters are all random, so that no wrong term hides behind a zero or a one."""
    module = Engram(config, layer_id=1, hidden_size=hidden_size, hc_mult=hc_mult, num_rows=num_rows)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def random_ids(config: MemoryConfig, batch: int, length: int, num_rows: int = ROWS) -> torch.Tensor:
    return torch.randint(0, num_rows, (batch, length, len(config.orders) * config.num_heads))


def run_loops(
    module: Engram, config: MemoryConfig, hidden: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Output, gates, and the float64 leaves (`hidden` and the parameters by name) that autograd differentiates."""
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    leaves["hidden"] = hidden.detach().double().requires_grad_()
    outputs, gates = loops.engram(
        leaves["hidden"],
        ids.tolist(),
        leaves,
        gate=config.gate,
        eps=config.norm_eps,
        conv_eps=config.conv_norm_eps,
        dilation=(config.conv and config.conv.dilation) or config.max_ngram_size,
        zero_centred=config.zero_centred_gains,
    )
    output = torch.stack([torch.stack([torch.stack(streams) for streams in row]) for row in outputs])
    return output, torch.tensor([[[float(gate) for gate in token] for token in row] for row in gates]), leaves


def compare_with_loops(module: Engram, config: MemoryConfig, hidden: torch.Tensor, ids: torch.Tensor) -> None:
    """Forward and backward against the loops, at the tolerance of the dtype of `hidden`."""
    dtype = hidden.dtype
    hidden = hidden.detach().requires_grad_()
    output = module(hidden, ids)
    assert output.dtype == dtype
    expected, _, leaves = run_loops(module, config, hidden, ids)
    assert_close(output, expected, "engram", dtype=dtype)

    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent.double())
    actual = {name: parameter.grad for name, parameter in module.named_parameters()} | {"hidden": hidden.grad}
    assert actual.keys() == leaves.keys()
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if actual[name] is None else actual[name]
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert name == "hidden" or gradient.dtype in (torch.float32, torch.float64), name
        assert_close(gradient, want, "engram_grad", name=f"gradient of {name}", dtype=dtype)
