"""DeepSeekMoE (arXiv 2401.06066, 2412.19437): router -> grouped experts, beside shared experts for every token.

Legend: B batch, L sequence, T = B L tokens, D hidden, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.config import MoEConfig
from engram.kernels.moe_experts import moe_experts
from engram.model.ffn import FeedForward


class Router(nn.Module):
    """Sigmoid affinities; the top k by affinity + balancing bias, weighted by affinity alone.

    Buffers: bias float32 [E] (loss-free balancing), load float32 [E] (choices counted since the last bias update).
    """

    bias: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K] summing to routed_scaling_factor, expert ids int64 [T, K], affinities [T, E]; float32."""
        # In float32, because near ties decide who is chosen.
        scores_TE = torch.sigmoid(x_TD.float() @ self.weight.t())
        choice_TE = scores_TE.detach() + self.bias
        if self.config.num_groups > 1:
            choice_TE = self._mask_groups(choice_TE)
        ids_TK = choice_TE.topk(self.config.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        return weights_TK, ids_TK, scores_TE

    def _mask_groups(self, choice_TE: Tensor) -> Tensor:
        """Rule out all but the best groups, each judged by its two best experts."""
        grouped = choice_TE.unflatten(1, (self.config.num_groups, -1))
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = group_scores.topk(self.config.top_k_groups, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)

    @torch.no_grad()
    def update_bias(self) -> None:
        """b += speed * sign(mean load - load), then start counting anew (Wang et al. 2024)."""
        self.bias += self.config.bias_update_speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Experts(nn.Module):
    """Weights of all routed experts: gate_up [E, 2, F, D], down [E, D, F]."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2, config.expert_dim, hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.expert_dim))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe_experts(x_TD, ids_TK, weights_TK, self.gate_up, self.down)


class Routed(NamedTuple):
    """What a MoE layer computes, and what its balance needs to know.

    The caller records the latter, or not: a checkpointed block is run a second time.
    """

    output: Tensor
    # Choices of each expert, float32 [E], and the sequence-wise balance loss, in training mode.
    load: Tensor | None = None
    balance_loss: Tensor | None = None


class MoE(nn.Module):
    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        self.shared = FeedForward(hidden_size, config.shared_width) if config.shared_width else None

    def forward(self, x_BLD: Tensor) -> Routed:
        x_TD = x_BLD.flatten(0, 1)
        weights_TK, ids_TK, scores_TE = self.router(x_TD)
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        y_BLD = y_TD.view_as(x_BLD)
        if not self.training:
            return Routed(y_BLD)
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, ids_TK, 1.0)
        balance = None
        if self.config.sequence_balance_loss:
            shape = (*x_BLD.shape[:2], -1)
            balance = sequence_balance_loss(scores_TE.view(shape), chosen_TE.view(shape), self.config)
        return Routed(y_BLD, chosen_TE.sum(0), balance)


def sequence_balance_loss(scores_BLE: Tensor, chosen_BLE: Tensor, config: MoEConfig) -> Tensor:
    """alpha * mean over sequences of sum_e f_e p_e (DeepSeek-V3, equations 17 to 20).

    f_e = E / (K L) * times expert e was chosen; p_e = mean normalised affinity: balanced routing gives alpha.
    """
    share_BE = chosen_BLE.mean(1) * (config.num_experts / config.top_k)
    affinity_BE = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean(1)
    return config.sequence_balance_loss * (share_BE * affinity_BE).sum(-1).mean()
