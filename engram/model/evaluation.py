"""Validation loss: the exact mean over a fixed set of tokens."""

from collections.abc import Callable, Iterable
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


def validation_loss(model: Transformer, batches: Iterable[TokenBatch], device: torch.device) -> float:
    """Mean cross-entropy per target in nats, every target weighing the same whatever its batch, in eval mode."""
    total, count = loss_sums(model, model.token_losses, batches, device).tolist()
    return total / max(count, 1)


@torch.no_grad()
def loss_sums(
    model: Transformer, token_losses: Callable[..., Tensor], batches: Iterable[TokenBatch], device: torch.device
) -> Tensor:
    """Sum of cross-entropies in nats, number of targets: float64 [2]. `token_losses`: how the model's are called."""
    training = model.training
    model.eval()
    # Sums of one batch are short; float64 keeps the sum over batches exact to the last digit that matters.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    # Compiled parts would be compiled once more, for evaluation alone.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            tokens, targets, document_ids = to_device(batch, device)
            sums[0] += token_losses(tokens, targets, document_ids).sum(dtype=torch.float64)
            sums[1] += (targets != IGNORE).sum()
    model.train(training)
    return sums


def to_device(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets and document ids on `device`; the copy to a GPU runs beside its computations."""
    return tuple(_move(part, device) for part in (batch.tokens, batch.targets, batch.document_ids))  # type: ignore[return-value]


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
