"""What turns batches into steps: the seam between the training loop and the processes that share the work."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from engram.model.evaluation import TokenBatch, validation_loss
from engram.model.transformer import Transformer
from engram.optim.optimizer import RoleOptimizer
from engram.training.checkpoint import Checkpoint
from engram.training.staged import StagedRows
from engram.training.statistics import layer_statistics
from engram.training.step import (
    Gradient,
    apply_gradient,
    compute_gradient,
    discard_gradient,
    nonfinite_gradients,
)
from engram.training.stored_tables import StoredTables
from engram.training.tensor_files import bounded_files

# Name of a file of tensors -> its tensors, all at once or one file after the other.
Files = Mapping[str, Mapping[str, Tensor]] | Iterable[tuple[str, Mapping[str, Tensor]]]


class Engine(Protocol):
    """A model with its optimizer, in one process or on several ranks, which then call every method alike.

    Batches are this rank's part of the global batch; losses, norms and what is finite are those of the global one.
    """

    @property
    def model(self) -> Transformer: ...

    def compute_gradient(self, batch: TokenBatch, following: Callable[[], TokenBatch] | None = None) -> Gradient:
        """Leave the clipped gradient of the batch's mean loss; meanwhile, rows of the `following` batch are fetched."""
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

    def measures(self) -> dict[str, float]:
        """What the last step asked of the tables: further keys of metrics.jsonl."""
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
    rows: StagedRows
    stored: StoredTables

    def compute_gradient(self, batch: TokenBatch, following: Callable[[], TokenBatch] | None = None) -> Gradient:
        self.rows.begin(batch, following)
        return compute_gradient(self.model, batch, self.micro_batch_size, self.clip_norm, self.device, self.rows)

    def apply_gradient(self, lr: float) -> None:
        apply_gradient(self.model, self.optimizer, lr)
        self.rows.updated()

    def discard_gradient(self) -> None:
        discard_gradient(self.model, self.optimizer)

    def nonfinite_gradients(self) -> list[str]:
        return nonfinite_gradients(self.model)

    def validation_loss(self, batches: Iterable[TokenBatch]) -> float:
        return validation_loss(self.model, self.rows.each(batches), self.device)

    def layer_statistics(self, batch: TokenBatch) -> dict[str, float]:
        return layer_statistics(self.model, batch, self.micro_batch_size, self.device)

    def measures(self) -> dict[str, float]:
        return self.rows.measures()

    def roles_table(self) -> str:
        return self.optimizer.roles_table()

    def tensors(self) -> Files:
        kinds = {"model": self.model.state_dict(), "optim": self.optimizer.tensors()}
        if not self.stored.staged:
            return kinds
        self.rows.flush()
        return chain.from_iterable(self._files(kind, tensors) for kind, tensors in kinds.items())

    def _files(self, kind: str, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
        whole = ((name, tensor) for name, tensor in tensors.items() if not self.stored.owns(name))
        return bounded_files(kind, 0, chain(whole, self.stored.slices(kind)))

    def scalars(self) -> dict[str, int | float]:
        return self.optimizer.scalars()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        checkpoint.fill(self.model, self.stored.shapes())
        self.stored.load("model", checkpoint.tensors("model"))

    def restore(self, checkpoint: Checkpoint) -> None:
        self.load_weights(checkpoint)
        self.optimizer.load_tensors(checkpoint.tensors("optim"), apart=self.stored.owns)
        self.stored.load("optim", checkpoint.tensors("optim"))
        self.optimizer.load_scalars(checkpoint.state["optimizer"])
