"""Matrix products of bfloat16 where the processor multiplies float32 only.

Without AVX-512 or AMX, products of bfloat16 matrices run on one core, ten times slower than those of float32. Operands
are then widened, which is exact: sums run in float32 as everywhere, and results are rounded to bfloat16 once.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def _cpu_lacks_bfloat16() -> bool:
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.compiler.assume_constant_result
def needs_widening(device: str, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` matrices on this type of device take longer than those of float32."""
    return device == "cpu" and dtype == torch.bfloat16 and _cpu_lacks_bfloat16()


def widened(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of one product, as they are multiplied fastest: themselves, or in float32. The caller rounds."""
    first = operands[0]
    return tuple(each.float() for each in operands) if needs_widening(first.device.type, first.dtype) else operands


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype; weight and bias in that dtype too."""
    wide_x, wide_weight = widened(x, weight)
    return F.linear(wide_x, wide_weight, None if bias is None else bias.to(wide_x.dtype)).to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b for (stacks of) matrices, in their dtype."""
    return torch.matmul(*widened(a, b)).to(a.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Tensor:
    """beta total + alpha a b for stacks of matrices [N, R, K] [N, K, C], in their dtype."""
    return torch.baddbmm(*widened(total, a, b), **factors).to(total.dtype)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b for matrices in out's dtype, or widened already."""
    if needs_widening(out.device.type, out.dtype):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)
