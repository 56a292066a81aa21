"""Experts divided among ranks: tokens travel to the ranks of their experts, their results travel back.

The ranks 0 to R - 1 of a group hold all experts of a layer together, each of them E / R; the next R ranks do so again.
Everything else of a layer (router, shared experts) stays on every rank.

Legend: T tokens of this rank, D hidden, K experts per token, E experts, F expert width, R ranks of a group; M rows
sent, one for each token and each rank with any of its experts; N rows received; C choices of experts that are here.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from engram.distributed.plan import check_expert_ranks
from engram.distributed.row_copies import Copies, copy_rows, exchange_rows, sum_copies
from engram.distributed.world import World
from engram.kernels.moe_experts import moe_experts
from engram.model.moe import Experts, MoE
from engram.model.transformer import Transformer


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """The ranks that this rank shares experts with."""

    # Ranks that hold all experts of a layer together, and this rank's place among them.
    size: int
    place: int
    expert_parallel: ProcessGroup
    # Ranks that hold the same experts: their gradients belong together.
    expert_data_parallel: ProcessGroup


class ShardedExperts(Experts):
    """Experts first, first + 1, ... of a layer: gate_up [E / R, 2, F, D], down [E / R, D, F].

    All ranks of a group call it together, backward too; a rank without a token takes part all the same. A checkpointed
    block sends its tokens a second time when it runs again.
    """

    def __init__(self, whole: Experts, groups: ExpertGroups) -> None:
        nn.Module.__init__(self)
        self.groups = groups
        self.num_experts = len(whole.gate_up)
        self.num_local = self.num_experts // groups.size
        self.first = groups.place * self.num_local
        for name, parameter in whole.named_parameters():
            own = parameter.detach()[self.first : self.first + self.num_local].clone()
            self.register_parameter(name, nn.Parameter(own, requires_grad=parameter.requires_grad))

    # Sizes that depend on the routing, and collectives, are not for the compiler.
    @torch.compiler.disable
    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sent, received, copies, num_choices = self._route(ids_TK)
        ids_MK = ids_TK[copies.source]
        x_ND, weights_NK, ids_NK = exchange_rows(
            (copy_rows(x_TD, copies), copy_rows(weights_TK, copies), ids_MK),
            sent,
            received,
            self.groups.expert_parallel,
        )
        # One choice after the other rather than K for each row: most experts of a row are elsewhere.
        local_NK = ids_NK - self.first
        elsewhere_NK = (local_NK < 0) | (local_NK >= self.num_local)
        chosen = Copies.of(elsewhere_NK.byte(), num_choices, most=self.num_local)
        y_CD = moe_experts(
            copy_rows(x_ND, chosen),
            local_NK.flatten().index_select(0, chosen.choice).unsqueeze(1),
            weights_NK.flatten().index_select(0, chosen.choice).unsqueeze(1),
            self.gate_up,
            self.down,
        )
        (y_MD,) = exchange_rows((sum_copies(y_CD, chosen),), received, sent, self.groups.expert_parallel)
        return sum_copies(y_MD, copies)

    @torch.no_grad()
    def _route(self, ids_TK: Tensor) -> tuple[list[int], list[int], Copies, int]:
        """Rows to send to and to receive from each rank, the rows' tokens, and the number of choices to come."""
        rank_TK = ids_TK.div(self.num_local, rounding_mode="floor")
        # A token is sent once to each rank, with the first of its choices there.
        again_TK = (rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)).tril(-1).any(2)
        counts_R2 = ids_TK.new_zeros(self.groups.size, 2)
        counts_R2[:, 0].scatter_add_(0, rank_TK.flatten(), (~again_TK).flatten().long())
        counts_R2[:, 1].scatter_add_(0, rank_TK.flatten(), torch.ones_like(rank_TK).flatten())
        others_R2 = torch.empty_like(counts_R2)
        distributed.all_to_all_single(others_R2, counts_R2, group=self.groups.expert_parallel)
        # The one wait for the device.
        own, others = torch.stack((counts_R2, others_R2)).tolist()
        sent, received = [rows for rows, _ in own], [rows for rows, _ in others]
        copies = Copies.of(rank_TK.masked_fill(again_TK, self.groups.size), sum(sent), most=self.groups.size)
        return sent, received, copies, sum(choices for _, choices in others)


def shard_experts(model: Transformer, world: World, expert_ranks: int, timeout_seconds: int = 600) -> None:
    """Leave this rank its part of the experts of every MoE layer, under their names; collective.

    Their values are those that the model holds, so ranks that built the same model hold the same experts as one
    process. Optimizers come after. Raises UserError as `check_expert_ranks` does.
    """
    check_expert_ranks(model.config, expert_ranks, world.size)
    if expert_ranks == 1:
        return
    groups = _make_groups(world, expert_ranks, timedelta(seconds=timeout_seconds))
    for layer in _moe_layers(model):
        layer.experts = ShardedExperts(layer.experts, groups)


def sharded_experts(model: nn.Module) -> dict[str, ShardedExperts]:
    """The divided experts of all layers by the name of their module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ShardedExperts)}


@torch.no_grad()
def reduce_expert_gradients(model: nn.Module) -> None:
    """Sum the gradients of divided experts over the ranks that hold the same ones; collective.

    A rank's gradient already stands for the tokens of its whole group, so the sum is that over all ranks' losses.
    """
    pending = []
    for experts in sharded_experts(model).values():
        for parameter in experts.parameters():
            assert parameter.grad is not None
            pending.append(
                distributed.all_reduce(parameter.grad, group=experts.groups.expert_data_parallel, async_op=True)
            )
    for work in pending:
        assert work is not None
        work.wait()


@torch.no_grad()
def sum_router_loads(model: nn.Module, world: World) -> None:
    """Before the bias update: choices of each expert since the last one, counted over all ranks; collective."""
    loads = [layer.router.load for layer in _moe_layers(model)]
    if loads:
        torch._foreach_copy_(loads, list(world.sum(torch.stack(loads))))


def _moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _make_groups(world: World, size: int, timeout: timedelta) -> ExpertGroups:
    ranks = range(world.size)
    # Every rank takes part in the making of every group, in the same order.
    together = [distributed.new_group(list(ranks[first : first + size]), timeout) for first in ranks[::size]]
    alike = [distributed.new_group(list(ranks[place::size]), timeout) for place in range(size)]
    number, place = divmod(world.rank, size)
    return ExpertGroups(size, place, together[number], alike[place])
