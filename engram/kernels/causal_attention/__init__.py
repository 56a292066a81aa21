"""Softmax attention of queries over earlier keys."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels.causal_attention.native_cpu import NativeAttention, native_obstacle
from engram.kernels.causal_attention.reference import causal, causal_attention_ref
from engram.kernels.choose import Implementation, check_devices, choose
from engram.kernels.products import widened

__all__ = ["causal_attention", "causal_attention_ref"]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    impl: Implementation | Literal["torch"] = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over keys up to the query's position, of those only where `mask` is True.

    q, k [B, H, T, D], v [B, H, T, V] in one dtype; mask bool [B, 1, T, T], causal, or None; every query sees a key;
    scale > 0. Returns [B, H, T, V]; softmax in float32.

    `native` is C++, for bfloat16 on CPU, and deterministic; `torch` is the fused kernel of torch, which `auto` takes on
    CUDA and wherever else `native` cannot run. Raises TypeError and ValueError for operands that do not fit together,
    ImplementationUnavailable for an implementation that cannot run.
    """
    _check(q, k, v, mask, scale)
    check_devices("causal_attention", q=q, k=k, v=v, mask=mask)
    chosen = _choice(impl, q.device.type, q.dtype)
    if chosen == "native":
        return NativeAttention.apply(q, k, v, mask, scale)
    if chosen == "torch":
        return _fused(q, k, v, mask, scale)
    return causal_attention_ref(q, k, v, mask, scale)


@torch.compiler.assume_constant_result
def _choice(impl: str, device: str, dtype: torch.dtype) -> str:
    if impl == "auto" and (device != "cpu" or dtype != torch.bfloat16):
        impl = "torch"
    obstacles = dict(native=lambda: native_obstacle(device, dtype), torch=lambda: None)
    return choose("causal_attention", impl, device, fallback="torch", **obstacles)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # CPU's fused kernel refuses values narrower than queries: zeros fill them up.
    missing = max(q.shape[-1] - v.shape[-1], 0) if q.device.type == "cpu" else 0
    padded = F.pad(v, (0, missing)) if missing else v
    if mask is not None:
        mask = mask & causal(q)
    wide_q, wide_k, wide_v = widened(q, k, padded)
    out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, mask, is_causal=mask is None, scale=scale)
    return out[..., : v.shape[-1]].to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"q and k must be [B, H, T, D] and v [B, H, T, V], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not q.shape[-1] or not v.shape[-1]:
        raise ValueError(f"queries {q.shape[-1]} wide and values {v.shape[-1]} wide: both must be at least 1")
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must be floating point, not {q.dtype}")
    batch, _, length, _ = q.shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, 1, length, length)):
        raise ValueError(
            f"mask must be bool {[batch, 1, length, length]}, not {mask.dtype} {list(mask.shape)}: one for all heads"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
