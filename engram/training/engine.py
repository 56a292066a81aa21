"""What turns batches into steps: the seam between the training loop and the processes that share the work."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engram.model.evaluation import TokenBatch, validation_loss
from engram.model.transformer import Transformer
from engram.optim.optimizer import RoleOptimizer
from engram.training.checkpoint import Checkpoint
from engram.training.statistics import layer_statistics
from engram.training.step import (
    Gradient,
    apply_gradient,
    compute_gradient,
    discard_gradient,
    nonfinite_gradients,
)

# Name of a file of tensors -> its tensors, all at once or one file after the other.
Files = Mapping[str, Mapping[str, Tensor]] | Iterable[tuple[str, Mapping[str, Tensor]]]


class Engine(Protocol):
    """A model with its optimizer, in one process or on several ranks, which then call every method alike.

    Batches are this rank's part of the global batch; losses, norms and what is finite are those of the global one.
    """

    @property
    def model(self) -> Transformer: ...

    def compute_gradient(self, batch: TokenBatch) -> Gradient:
        """Leave the clipped gradient of the batch's mean loss."""
        ...

    def apply_gradient(self, lr: float) -> None:
        """Update parameters and router biases at base learning rate `lr`, and forget the gradient."""
        ...

    def discard_gradient(self) -> None:
        """Leave parameters and router biases as they were, and forget the gradient and the experts' loads."""
        ...

    def nonfinite_gradients(self) -> list[str]:
        """Names of the parameters whose gradients hold an infinity or a NaN."""
        ...

    def validation_loss(self, batches: Iterable[TokenBatch]) -> float:
        """Mean cross-entropy over all targets, in nats; the batches are whole, the same on all ranks."""
        ...

    def layer_statistics(self, batch: TokenBatch) -> dict[str, float]:
        """What single layers do on this batch, and with the gradient of this step."""
        ...

    def roles_table(self) -> str:
        """Every parameter's shape and optimizer role as text."""
        ...

    def tensors(self) -> Files:
        """What this rank adds to a checkpoint: files named model... and optim... ."""
        ...

    def scalars(self) -> dict[str, int | float]:
        """The optimizer's counts."""
        ...

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over weights. Raises CheckpointError."""
        ...

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over weights and optimizer state. Raises CheckpointError, OptimizerStateError."""
        ...


@dataclass
class LocalEngine:
    """One process that holds everything."""

    model: Transformer
    optimizer: RoleOptimizer
    device: torch.device
    micro_batch_size: int
    clip_norm: float | None

    def compute_gradient(self, batch: TokenBatch) -> Gradient:
        return compute_gradient(self.model, batch, self.micro_batch_size, self.clip_norm, self.device)

    def apply_gradient(self, lr: float) -> None:
        apply_gradient(self.model, self.optimizer, lr)

    def discard_gradient(self) -> None:
        discard_gradient(self.model, self.optimizer)

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_gradients(self.model)

    def validation_loss(self, batches: Iterable[TokenBatch]) -> float:
        return validation_loss(self.model, batches, self.device)

    def layer_statistics(self, batch: TokenBatch) -> dict[str, float]:
        return layer_statistics(self.model, batch, self.micro_batch_size, self.device)

    def roles_table(self) -> str:
        return self.optimizer.roles_table()

    def tensors(self) -> Files:
        return {"model": self.model.state_dict(), "optim": self.optimizer.tensors()}

    def scalars(self) -> dict[str, int | float]:
        return self.optimizer.scalars()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        checkpoint.fill(self.model)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.load_weights(checkpoint)
        self.optimizer.load_tensors(checkpoint.tensors("optim"))
        self.optimizer.load_scalars(checkpoint.state["optimizer"])
