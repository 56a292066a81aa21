"""Routed experts, one expert after the other: the specification.

Legend: T tokens, D hidden, E experts, F expert width, K experts per token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def moe_experts_ref(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """y_t = sum_k w_tk down_e (silu(gate_e x_t) * up_e x_t) with e = ids[t, k]."""
    y = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for expert, (gate_up, down) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        token, choice = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = gate_up
        hidden = F.silu(x_TD[token] @ gate.T) * (x_TD[token] @ up.T)
        y = y.index_add(0, token, (hidden @ down.T).to(y.dtype) * weights_TK[token, choice].unsqueeze(1))
    return y.to(x_TD.dtype)
