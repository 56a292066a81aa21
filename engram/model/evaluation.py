"""Validation loss: the exact mean over a fixed set of tokens."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from engram.model.transformer import IGNORE, Transformer


class TokenBatch(Protocol):
    """int64 [B, T] each; a target of -100 is not scored."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def document_ids(self) -> Tensor | None: ...


@torch.no_grad()
def validation_loss(model: Transformer, batches: Iterable[TokenBatch], device: torch.device) -> float:
    """Mean cross-entropy per target in nats, every target weighing the same whatever its batch, in eval mode."""
    training = model.training
    model.eval()
    # Sums of one batch are short; float64 keeps the sum over batches exact to the last digit that matters.
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    # Compiled parts would be compiled once more, for evaluation alone.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            count += int((batch.targets != IGNORE).sum())
            tokens, targets, document_ids = to_device(batch, device)
            total += model.token_losses(tokens, targets, document_ids).sum(dtype=torch.float64)
    model.train(training)
    return total.item() / max(count, 1)


def to_device(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets and document ids on `device`; the copy to a GPU runs beside its computations."""
    return tuple(_move(part, device) for part in (batch.tokens, batch.targets, batch.document_ids))  # type: ignore[return-value]


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
