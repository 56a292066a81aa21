"""One optimizer step: gradients of a batch in micro-batches, a look at whether they are finite, the update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.model.evaluation import TokenBatch, to_device
from engram.model.transformer import IGNORE, Transformer
from engram.optim.clip import clip_grad_norm
from engram.optim.optimizer import RoleOptimizer
from engram.optim.sparse import coalesce


@dataclass(frozen=True)
class Gradient:
    """Loss and global gradient norm (before clipping) of one step."""

    loss: float
    norm: float
    finite: bool


def compute_gradient(
    model: Transformer, batch: TokenBatch, micro_batch_size: int, clip_norm: float | None, device: torch.device
) -> Gradient:
    """Leave the clipped gradient of the batch's mean loss on the parameters.

    Loss and norm are read from the device here, once a step: whether they are finite decides if the step is taken. The
    queue of a GPU runs dry for the few launches between this read and the update.
    """
    loss = accumulate(model, batch, micro_batch_size, device)
    norm = clip_grad_norm(model.parameters(), clip_norm)
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    return Gradient(loss_value, norm_value, finite=math.isfinite(loss_value) and math.isfinite(norm_value))


def accumulate(model: Transformer, batch: TokenBatch, micro_batch_size: int, device: torch.device) -> Tensor:
    """Add the gradient of the batch's mean loss to `.grad`, one micro-batch after the other, and return that loss.

    A micro-batch weighs as much as its share of the targets, so any split of the batch has the same gradient.
    """
    counts = (batch.targets != IGNORE).sum(1).split(micro_batch_size)
    all_targets = max(1, sum(int(count.sum()) for count in counts))
    parts = [
        part.split(micro_batch_size) if part is not None else [None] * len(counts) for part in to_device(batch, device)
    ]
    total = torch.zeros((), device=device)
    for count, tokens, targets, document_ids in zip(counts, *parts, strict=True):
        loss = model.loss(tokens, targets, document_ids) * (int(count.sum()) / all_targets)
        loss.backward()
        if len(counts) > 1:
            merge_table_gradients(model)
        total += loss.detach()
    return total


def merge_table_gradients(model: Transformer) -> None:
    """One entry per row: added up as they come, the reads of all micro-batches would pile up."""
    for table in model.tables():
        if table.weight.grad is not None and table.weight.grad.is_sparse:
            table.weight.grad = coalesce(table.weight.grad)


def apply_gradient(model: Transformer, optimizer: RoleOptimizer, lr: float) -> None:
    """Update parameters and router biases, and clear the gradients."""
    optimizer.step(lr)
    model.update_router_bias()
    optimizer.zero_grad()


def discard_gradient(model: Transformer, optimizer: RoleOptimizer) -> None:
    """Leave parameters and router biases as they were, and forget the step's gradients and expert loads."""
    optimizer.zero_grad()
    for name, buffer in model.named_buffers():
        if name.endswith("router.load"):
            buffer.zero_()


def nonfinite_gradients(model: Transformer) -> list[str]:
    """Names of the parameters whose gradients hold an infinity or a NaN."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(_values(parameter.grad)).all())
    ]


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
