"""The optimizer that DeepSpeed calls: it hands each tensor that it is given to the role that moves it."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram.config import OptimConfig
from engram.distributed.divided_muon import DividedMuon
from engram.distributed.shares import Member, Share
from engram.distributed.world import World
from engram.optim.adamw import AdamW
from engram.optim.groups import Assignment
from engram.optim.muon import Muon
from engram.optim.role import Role


class RoleSteps(torch.optim.Optimizer):
    """Groups of parameters that share a role, a factor on the learning rate and a weight decay; some stay apart.

    DeepSpeed puts flat float32 tensors into the place of the parameters (stages 1 to 3) and may call `step` for some of
    them at a time. Its own optimizers are not used: its Muon is recognised by class, has other scales, splits no stored
    matrix into several, and takes gradients into its momentum before they could be clipped.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        apart: Container[Tensor] = (),
        marks: Mapping[str, object] | None = None,
    ) -> None:
        """Parameters in `apart` are never in a group with others; `marks` are keys of their groups."""
        kinds: dict[tuple[str, float, float, bool], list[Assignment]] = {}
        for each in assignments:
            kind = each.role, each.lr_multiplier, each.weight_decay, each.parameter in apart
            kinds.setdefault(kind, []).append(each)
        self.kinds = list(kinds.values())
        groups = [
            {"params": [each.parameter for each in same], **(marks or {} if marked else {})}
            for (*_, marked), same in kinds.items()
        ]
        super().__init__(groups, {"lr": 0.0})
        self.roles: dict[Tensor, Role] = {}
        # None: the next steps change nothing.
        self.lr: float | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if self.lr is None:
            return
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for role in dict.fromkeys(self.roles[tensor] for tensor in tensors):
            role.step(self.lr)


def undivided_shares(steps: RoleSteps, optim: OptimConfig, members: Mapping[Tensor, Member]) -> list[Share]:
    """Every parameter as a share of its own, undivided; gives `steps` the roles of one process.

    `members`: those that are part of larger parameters. All others are the same on every rank.
    """
    shares = []
    roles: dict[str, Role] = {}
    assignments = [each for kind in steps.kinds for each in kind]
    for name in dict.fromkeys(each.role for each in assignments):
        own = [each for each in assignments if each.role == name]
        if name == "muon":
            assert optim.muon is not None
            roles[name] = Muon(own, optim.muon)
        else:
            roles[name] = AdamW(own, optim.betas, optim.eps)
    for each in assignments:
        steps.roles[each.parameter] = roles[each.role]
        member = members.get(each.parameter) or Member(each, each.shape, ())
        shares.append(Share(each.parameter, [member], roles[each.role], key=each.name))
    return shares


def divided_share(
    steps: RoleSteps, key: str, weights: Tensor, members: list[Member], optim: OptimConfig, world: World
) -> Share:
    """The share of flat `weights`; gives `steps` their role."""
    first = members[0].assignment
    role: Role
    if first.role == "muon":
        assert optim.muon is not None
        role = DividedMuon(key, weights, members, optim.muon, world)
    else:
        flat = Assignment(key, weights, "adamw", first.lr_multiplier, first.weight_decay)  # type: ignore[arg-type]
        role = AdamW([flat], optim.betas, optim.eps)
    steps.roles[weights] = role
    return Share(weights, members, role, key)
