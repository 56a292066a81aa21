"""Routed experts on grouped matrix products, without a loop over experts.

Tokens are laid out in slots, expert after expert; every expert's share is padded to a multiple of BLOCK slots, so that
changing loads meet few distinct matrix shapes (CPU libraries prepare each new shape anew). Padding slots hold zeros.
Gathers go both ways (a token knows its K slots, a slot knows its token): nothing is scattered, so results repeat.

Legend: T tokens, D hidden, E experts, F expert width, K experts per token, S slots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.kernels.products import widened

BLOCK = 16


def assign_slots(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """slot_of_choice int64 [T K], choice_of_slot int64 [S] (T K marks padding), and each expert's end int32 [E]."""
    flat = ids_TK.flatten()
    order = torch.argsort(flat, stable=True)
    counts_E = (flat.unsqueeze(1) == torch.arange(num_experts, device=flat.device)).sum(0)
    padded_E = (counts_E + BLOCK - 1).div(BLOCK, rounding_mode="floor") * BLOCK
    ends_E = padded_E.cumsum(0)
    # How far each expert's slots lie behind its place in sorted order.
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    num_choices = flat.numel()
    sorted_slots = torch.arange(num_choices, device=flat.device) + shift_E[flat[order]]
    slot_of_choice = torch.empty_like(order).scatter_(0, order, sorted_slots)
    # A bound that does not depend on the routing keeps shapes static: each expert that can be chosen may need one
    # partial block. Slots behind the last expert's end are never written and never read.
    most = num_choices + min(num_experts, num_choices) * (BLOCK - 1)
    num_slots = (most + BLOCK - 1) // BLOCK * BLOCK
    choice_of_slot = torch.full((num_slots,), num_choices, dtype=torch.int64, device=flat.device)
    choice_of_slot.scatter_(0, slot_of_choice, torch.arange(num_choices, device=flat.device))
    return slot_of_choice, choice_of_slot, ends_E.to(torch.int32)


@torch.library.custom_op("engram::grouped_product", mutates_args=())
def grouped_product(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """One product per expert: a [S, M] b [E, M, N] -> [S, N], or a [M, S] b [S, N] -> [E, M, N].

    An operation of its own, because torch 2.13 cannot trace `grouped_mm` in float32.
    """
    wide_a, wide_b = widened(a, b)
    return F.grouped_mm(wide_a, wide_b, offs=ends_E).to(a.dtype)


@grouped_product.register_fake
def _(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    rows = (len(ends_E), len(a)) if b.dim() == 2 else (len(a),)
    return a.new_empty(*rows, b.shape[-1])


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], where an index one past the end reads a zero row."""
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))).index_select(0, index)


class GroupedExperts(torch.autograd.Function):
    """Forward keeps the gathered input and the pre-activation; the backward pass recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        top_k = ids_TK.shape[1]
        slot_of_choice, choice_of_slot, ends_E = assign_slots(ids_TK, len(gate_up))
        token_of_slot = choice_of_slot.div(top_k, rounding_mode="floor")
        x_SD = _gather(x_TD, token_of_slot)
        gate_up_SF = grouped_product(x_SD, gate_up.transpose(1, 2), ends_E)
        gate, up = gate_up_SF.chunk(2, dim=-1)
        out_SD = grouped_product(F.silu(gate) * up, down.transpose(1, 2), ends_E)
        out_TKD = out_SD.index_select(0, slot_of_choice).unflatten(0, ids_TK.shape)
        ctx.save_for_backward(x_SD, gate_up_SF, weights_TK, gate_up, down, slot_of_choice, choice_of_slot, ends_E)
        return (out_TKD * weights_TK.unsqueeze(-1).to(out_TKD.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, gate_up_SF, weights_TK, gate_up, down, slot_of_choice, choice_of_slot, ends_E = ctx.saved_tensors
        (dy_TD,) = grads
        top_k = weights_TK.shape[1]
        weights_S = _gather(weights_TK.flatten(), choice_of_slot).unsqueeze(1).to(dy_TD.dtype)
        dy_SD = _gather(dy_TD, choice_of_slot.div(top_k, rounding_mode="floor"))

        gate, up = gate_up_SF.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        act_SF = silu * up
        # Without the weight: its product with the activation is the weight's own gradient.
        dact_SF = grouped_product(dy_SD, down, ends_E)
        dweights_S = (dact_SF.float() * act_SF.float()).sum(1)
        dact_SF = dact_SF * weights_S
        dgate = dact_SF * up * (sigmoid + silu * (1 - sigmoid))
        dgate_up_SF = torch.cat((dgate, dact_SF * silu), dim=-1)

        ddown = grouped_product(dy_SD.t(), act_SF * weights_S, ends_E)
        dgate_up = grouped_product(dgate_up_SF.t(), x_SD, ends_E)
        dx_SD = grouped_product(dgate_up_SF, gate_up, ends_E)
        dx_TD = dx_SD.index_select(0, slot_of_choice).unflatten(0, weights_TK.shape).sum(1)
        dweights_TK = dweights_S.index_select(0, slot_of_choice).view_as(weights_TK)
        return dx_TD, None, dweights_TK, dgate_up, ddown
