"""The one tolerance table: `|actual - expected| <= tolerance * (|expected| + rms(expected))`, element by element.

The root mean square makes the bound free of scale and lets no wrong element hide behind a large one.
"""

from typing import Any

import numpy as np
import torch

# Operation -> dtype of the computation -> tolerance. Expected values are float64.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "table": {torch.float32: 1e-6},
    # The tables' storage: one spacing of bfloat16 where a sum lies on the other side of a rounding's threshold.
    "table_update": {torch.float32: 1e-5, torch.bfloat16: 8e-3},
    "gate": {torch.float32: 1e-5, torch.bfloat16: 1e-5},
    "conv": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "gate_conv": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "gate_conv_grad": {torch.float32: 5e-5, torch.bfloat16: 1e-2},
    "engram": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "engram_grad": {torch.float32: 5e-5, torch.bfloat16: 6e-2},
    "moe_experts": {torch.float32: 1e-5, torch.bfloat16: 4e-2},
    "causal_attention": {torch.float32: 3e-5, torch.bfloat16: 6e-2},
    "mhc": {torch.float32: 2e-5, torch.bfloat16: 6e-2},
    "over_encoding": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "moe_experts_triton": {torch.float32: 1e-5, torch.bfloat16: 4e-2},
    "linear_cross_entropy": {torch.float32: 1e-5, torch.bfloat16: 4e-2},
}


def assert_close(
    actual: Any, expected: Any, op: str, *, name: str = "output", dtype: torch.dtype = torch.float32
) -> None:
    """Compare tensors (sparse ones too), arrays or nested lists with the tolerance of `op` computed in `dtype`."""
    got, want = _float64(actual), _float64(expected)
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    tolerance = TOLERANCES[op][dtype]
    excess = (got - want).abs() - tolerance * (want.abs() + want.square().mean().sqrt())
    # NaN compares false: it must count as wrong.
    wrong = ~(excess <= 0)
    if wrong.any():
        worst = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        where = tuple(int(i) for i in np.unravel_index(worst, want.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {want.numel()} elements are off; worst at {where}: "
            f"{got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g} ({op}, {dtype}, tolerance {tolerance:g})"
        )


def _float64(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.to_dense() if value.is_sparse else value).double().cpu()
    return torch.as_tensor(np.asarray(value, dtype=np.float64))
