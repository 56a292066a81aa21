"""One optimizer over all roles: Muon for hidden matrices, AdamW for the rest, a row-sparse one for n-gram tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from engram.config import OptimConfig, TableOptimConfig, UserError
from engram.kernels.table_update.part import TablePart
from engram.optim.adamw import AdamW
from engram.optim.groups import Assignment, RoleError, RoleName, assign_roles, roles_table
from engram.optim.muon import Muon
from engram.optim.role import Role
from engram.optim.row_adam import RowAdam
from engram.optim.rowwise_adagrad import RowwiseAdagrad
from engram.optim.sinkhorn import SinkhornMomentum

Value = TypeVar("Value")


class OptimizerStateError(UserError):
    """A saved optimizer state does not fit the model or the settings."""


class RoleOptimizer:
    """The roles of a model's parameters, with their state as two flat dictionaries keyed `<parameter>/<state>`.

    The state is complete from the start and determines every later update bit by bit.
    """

    def __init__(self, assignments: Sequence[Assignment], roles: Sequence[Role]) -> None:
        self.groups = list(assignments)
        self._roles = list(roles)

    def roles_table(self) -> str:
        """Every parameter's shape, role, learning-rate factor and weight decay as aligned text."""
        return roles_table(self.groups)

    def step(self, lr: float) -> None:
        """One update at base learning rate `lr` of every parameter that has a gradient."""
        for role in self._roles:
            role.step(lr)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for each in self.groups:
            each.parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Moments and other tensors: the live ones, not copies."""
        return {key: tensor for role in self._roles for key, tensor in role.tensors.items()}

    def scalars(self) -> dict[str, int | float]:
        """Update counts."""
        return {key: count for role in self._roles for key, count in role.counts.items()}

    def load_tensors(self, saved: Mapping[str, Tensor], apart: Callable[[str], bool] = lambda key: False) -> None:
        """Copy saved tensors into the state. Raises OptimizerStateError, before any copy, naming what does not fit.

        `apart` tells which keys somebody else takes over.
        """
        own = self.tensors()
        _check_keys(own, saved)
        own = {key: tensor for key, tensor in own.items() if not apart(key)}
        for key, tensor in own.items():
            check_saved(key, saved[key].shape, saved[key].dtype, tensor.shape, tensor.dtype)
        for key, tensor in own.items():
            tensor.copy_(saved[key])

    def load_scalars(self, saved: Mapping[str, int | float]) -> None:
        """Take over saved counts. Raises OptimizerStateError as `load_tensors` does."""
        _check_keys(self.scalars(), saved)
        for role in self._roles:
            role.counts.update({key: int(saved[key]) for key in role.counts})


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optim: OptimConfig,
    parts: Mapping[str, TablePart] | None = None,
) -> RoleOptimizer:
    """Assign a role to every parameter (on its final device) and allocate the state. Raises RoleError.

    `parts`: what the parameters of tables that are not whole hold of them.
    """
    assignments = assign_roles(named_parameters, optim, parts=parts)

    def having(role: RoleName) -> list[Assignment]:
        return [each for each in assignments if each.role == role]

    roles: list[Role] = [AdamW(having("adamw"), optim.betas, optim.eps), table_role(having("table"), optim.table)]
    if optim.muon:
        roles.append(Muon(having("muon"), optim.muon))
    return RoleOptimizer(assignments, roles)


def table_role(tables: Sequence[Assignment], settings: TableOptimConfig) -> Role:
    """The update of tables that `settings.kind` names. Raises RoleError: dtypes that it cannot move."""
    match settings.kind:
        case "row_adam":
            return RowAdam(tables, settings.betas, settings.eps)
        case "rowwise_adagrad":
            return RowwiseAdagrad(tables, settings.eps)
        case "sinkhorn":
            return SinkhornMomentum(tables, settings)
        case "dense_adam":
            if coarse := [each.name for each in tables if each.parameter.dtype != torch.float32]:
                raise RoleError(
                    f"{coarse[0]} is stored in bfloat16, but optim.table.kind dense_adam moves float32 tables only: "
                    "choose another kind, or set table_dtype to float32"
                )
            return AdamW(tables, settings.betas, settings.eps)


def check_saved(
    key: str, found: Sequence[int], found_dtype: torch.dtype, needed: Sequence[int], needed_dtype: torch.dtype
) -> None:
    """Raises OptimizerStateError where a saved state has not the shape and dtype that are needed."""
    if tuple(found) != tuple(needed) or found_dtype != needed_dtype:
        raise OptimizerStateError(
            f"the saved {key} is {found_dtype} {list(found)}, but this model needs "
            f"{needed_dtype} {list(needed)}: resume with the model that it was saved with"
        )


def _check_keys(own: Mapping[str, Value], saved: Mapping[str, Value]) -> None:
    for problem, keys in (("lacks", own.keys() - saved.keys()), ("has an unexpected", saved.keys() - own.keys())):
        if keys:
            first, *others = sorted(keys)
            more = f" and {len(others)} more" if others else ""
            raise OptimizerStateError(
                f"the saved optimizer state {problem} {first}{more}: resume with the model, optim.muon and "
                "optim.table.kind that it was saved with"
            )
