"""What the optimizer roles share: the parameters they own and their state."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from engram.optim.groups import Assignment
from engram.optim.sparse import sum_duplicate_rows


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

    Weight decay is lazy: it reaches exactly the rows that the update reaches.
    """

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for assignment in self.assignments:
            gradient = assignment.parameter.grad
            if gradient is None:
                continue
            assert gradient.is_sparse, f"{assignment.name}: {type(self).__name__} needs a sparse gradient"
            rows_U, values_UD = sum_duplicate_rows(gradient)
            self.update(assignment, rows_U, values_UD, lr * assignment.lr_multiplier)

    @abstractmethod
    def update(self, assignment: Assignment, rows_U: Tensor, gradient_UD: Tensor, lr: float) -> None:
        """Move one table, given the distinct rows that were read and their summed gradients."""


def rows_per_chunk(table: Tensor) -> int:
    """Rows to handle at once: on CPUs, so few that they and their temporaries stay in the cache."""
    elements = 2**17 if table.device.type == "cpu" else 2**26
    return max(1, elements // table.shape[1])
