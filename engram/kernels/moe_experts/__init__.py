"""Routed SwiGLU experts: y_t = sum_k w_tk E_{e_tk}(x_t), every product grouped by expert."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels.choose import Implementation, check_devices, choose, triton_obstacle, width_obstacle
from engram.kernels.moe_experts.grouped import GroupedExperts
from engram.kernels.moe_experts.native_cpu import NativeExperts, checked_ids, native_obstacle
from engram.kernels.moe_experts.reference import moe_experts_ref

__all__ = ["moe_experts", "moe_experts_ref"]


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    impl: Implementation | Literal["grouped"] = "auto",
) -> Tensor:
    """E_e(x) = down_e (silu(gate_e x) * up_e x), weighted and summed over each token's experts.

    x [T, D]; expert_ids int64 [T, K]; weights float32 [T, K]; gate_up [E, 2, F, D] and down [E, D, F] in x's dtype or
    float32 (products run in x's dtype; `native` reads and differentiates float32 masters without a copy). Returns
    [T, D] in x's dtype. Deterministic forward and backward.

    `native` is C++, for bfloat16 on CPU; `triton` needs D and F to be multiples of 16; `grouped` is torch's grouped
    product, which `auto` takes where its first choice cannot run. Raises TypeError and ValueError for operands that do
    not fit together, ImplementationUnavailable for an implementation that cannot run; on CPU, IndexError
    for an expert id out of range.
    """
    _check(x, expert_ids, weights, gate_up, down)
    check_devices("moe_experts", x=x, expert_ids=expert_ids, weights=weights, gate_up=gate_up, down=down)
    chosen = _choice(impl, x.device.type, x.dtype, *down.shape[1:])
    if chosen == "native":
        return NativeExperts.apply(x, expert_ids, weights, gate_up, down)
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    if x.device.type == "cpu":
        expert_ids = checked_ids(expert_ids, len(gate_up))
    if chosen == "triton":
        from engram.kernels.moe_experts.triton import moe_experts_triton

        return moe_experts_triton(x, expert_ids, weights, gate_up, down)
    if chosen == "grouped":
        return _grouped(x, expert_ids, weights, gate_up, down)
    return moe_experts_ref(x, expert_ids, weights, gate_up, down)


@torch.compiler.assume_constant_result
def _choice(impl: str, device: str, dtype: torch.dtype, hidden: int, width: int) -> str:
    if impl == "auto" and device == "cpu" and dtype != torch.bfloat16:
        impl = "grouped"
    return choose(
        "moe_experts",
        impl,
        device,
        fallback="grouped",
        triton=lambda: triton_obstacle(device) or width_obstacle("tokens", hidden) or width_obstacle("experts", width),
        native=lambda: native_obstacle(device, dtype),
        grouped=lambda: None,
    )


def _grouped(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden, width = down.shape[1:]
    extra_hidden, extra_width = _missing(hidden, x.element_size()), _missing(width, x.element_size())
    if extra_hidden or extra_width:
        # Grouped products want rows of whole 16 bytes: zeros fill odd widths and change no sum.
        x = F.pad(x, (0, extra_hidden))
        gate_up = F.pad(gate_up, (0, extra_hidden, 0, extra_width))
        down = F.pad(down, (0, extra_width, 0, extra_hidden))
    return GroupedExperts.apply(x, expert_ids, weights, gate_up.flatten(1, 2), down)[:, :hidden]


def _missing(size: int, element_size: int) -> int:
    return -size % (16 // element_size)


def _check(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if expert_ids.dtype != torch.int64 or weights.dtype != torch.float32:
        raise TypeError(f"expert_ids must be int64 and weights float32, not {expert_ids.dtype} and {weights.dtype}")
    if gate_up.dtype != down.dtype or gate_up.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"gate_up and down must share x's dtype or float32, not {gate_up.dtype} and {down.dtype} for {x.dtype}"
        )
    if x.dim() != 2 or expert_ids.dim() != 2 or expert_ids.shape != weights.shape or len(expert_ids) != len(x):
        raise ValueError(
            "x must be [T, D], expert_ids and weights [T, K], not "
            f"{list(x.shape)}, {list(expert_ids.shape)} and {list(weights.shape)}"
        )
    if not expert_ids.shape[1]:
        raise ValueError("every token needs at least one expert, but expert_ids and weights have no columns")
    experts, hidden, width = down.shape if down.dim() == 3 else (0, 0, 0)
    if hidden != x.shape[1] or gate_up.shape != (experts, 2, width, hidden):
        raise ValueError(
            "gate_up must be [E, 2, F, D] and down [E, D, F], not "
            f"{list(gate_up.shape)} and {list(down.shape)} for a hidden size of {x.shape[1]}"
        )
    if expert_ids.numel() >= 2**31:
        raise ValueError(f"at most 2^31 - 1 choices are sorted at once, not {expert_ids.numel()}")
