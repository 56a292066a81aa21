"""Routed SwiGLU experts: y_t = sum_k w_tk E_{e_tk}(x_t), every product grouped by expert."""

from torch import Tensor
from torch.nn import functional as F

from engram.kernels.moe_experts.grouped import GroupedExperts
from engram.kernels.moe_experts.reference import moe_experts_ref

__all__ = ["moe_experts", "moe_experts_ref"]


def moe_experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """E_e(x) = down_e (silu(gate_e x) * up_e x), weighted and summed over each token's experts.

    x [T, D], gate_up [E, 2, F, D] and down [E, D, F] share one dtype; expert_ids int64 [T, K]; weights float32 [T, K].
    Returns [T, D] in x's dtype. Deterministic forward and backward.
    """
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
