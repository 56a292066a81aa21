"""What the optimizer roles share: the parameters they own and their state."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from engram.optim.groups import Assignment
from engram.optim.sparse import ascending, coalesce


class Role(ABC):
    """The update of the parameters of one role.

    `tensors` and `counts` are the whole state, keyed `<parameter name>/<state name>`, complete from the start. A
    parameter without a gradient is left alone: neither its weights nor its state change.
    """

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        self.assignments = list(assignments)
        self.tensors: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @abstractmethod
    def step(self, lr: float) -> None:
        """One update at base learning rate `lr`; each parameter's multiplier comes on top."""


class TableRole(Role):
    """The update of tables from row-sparse gradients.

    Weight decay is lazy: it reaches exactly the rows that the update reaches. Tables in bfloat16 are rounded
    stochastically, by a hash of the table's name and of its count of updates, which is part of the state; their
    gradients, and all other state, are float32.
    """

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        super().__init__(assignments)
        for each in self.assignments:
            if each.parameter.dtype == torch.bfloat16:
                self.counts[f"{each.name}/step"] = 0
                # Else every sum over micro-batches would be rounded.
                each.parameter.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for assignment in self.assignments:
            gradient = assignment.parameter.grad
            if gradient is None:
                continue
            assert gradient.is_sparse, f"{assignment.name}: {type(self).__name__} needs a sparse gradient"
            # Clipping has done so already.
            gradient = coalesce(gradient)
            if assignment.part is not None:
                gradient = ascending(gradient)
            self.update(assignment, gradient, lr * assignment.lr_multiplier, self._next_seed(assignment))

    @abstractmethod
    def update(self, assignment: Assignment, gradient: Tensor, lr: float, seed: int) -> None:
        """Move one table by a coalesced gradient; `seed` is of the rounding."""

    def _next_seed(self, assignment: Assignment) -> int:
        key = f"{assignment.name}/step"
        if key not in self.counts:
            return 0
        self.counts[key] += 1
        return zlib.crc32(f"{key} {self.counts[key]}".encode())


def row_ids(assignment: Assignment, gradient: Tensor) -> Tensor | None:
    """Numbers in the whole table of a coalesced gradient's rows, int64 [U]; None where they are the rows themselves."""
    return assignment.part.row_ids(gradient._indices()[0]) if assignment.part else None
