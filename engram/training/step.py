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
from engram.training.staged import StagedRows


@dataclass(frozen=True)
class Gradient:
    """Loss and global gradient norm (before clipping) of one step."""

    loss: float
    norm: float
    finite: bool


def compute_gradient(
    model: Transformer,
    batch: TokenBatch,
    micro_batch_size: int,
    clip_norm: float | None,
    device: torch.device,
    rows: StagedRows | None = None,
) -> Gradient:
    """Leave the clipped gradient of the batch's mean loss on the parameters; `rows` has begun this batch.

    Loss and norm are read from the device here, once a step: whether they are finite decides if the step is taken. The
    queue of a GPU runs dry for the few launches between this read and the update.
    """
    loss = accumulate(model, batch, micro_batch_size, device)
    if rows is not None:
        rows.finish()
    norm = clip_grad_norm(model.parameters(), clip_norm)
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    return Gradient(loss_value, norm_value, finite=math.isfinite(loss_value) and math.isfinite(norm_value))


def accumulate(model: Transformer, batch: TokenBatch, micro_batch_size: int, device: torch.device) -> Tensor:
    """Add the gradient of the batch's mean loss to `.grad`, one micro-batch after the other, and return that loss."""
    micro_batches = weighted_micro_batches(batch, micro_batch_size, device, number_of_targets(batch))
    total = torch.zeros((), device=device)
    for weight, tensors in micro_batches:
        loss = model.loss(*tensors) * weight
        loss.backward()
        if len(micro_batches) > 1:
            merge_table_gradients(model)
        total += loss.detach()
    return total


def number_of_targets(batch: TokenBatch) -> int:
    return int((batch.targets != IGNORE).sum())


def weighted_micro_batches(
    batch: TokenBatch, size: int, device: torch.device, all_targets: int
) -> list[tuple[float, tuple[Tensor, Tensor, Tensor | None]]]:
    """(weight, (tokens, targets, document_ids)) of each part of `size` sequences.

    A part weighs as much as its share of `all_targets`, so any split of a batch, over time or over ranks, has the same
    gradient.
    """
    counts = [int(part.sum()) for part in (batch.targets != IGNORE).split(size)]
    tokens, targets, document_ids = (
        part.split(size) if part is not None else [None] * len(counts) for part in to_device(batch, device)
    )
    weights = [count / max(1, all_targets) for count in counts]
    return list(zip(weights, zip(tokens, targets, document_ids, strict=True), strict=True))


def merge_table_gradients(model: Transformer) -> None:
    """One entry per row: added up as they come, the reads of all micro-batches would pile up."""
    for table in model.tables():
        leaf = table.leaf
        if leaf.grad is not None and leaf.grad.is_sparse:
            leaf.grad = coalesce(leaf.grad)


def apply_gradient(model: Transformer, optimizer: RoleOptimizer, lr: float) -> None:
    """Update parameters and router biases, and clear the gradients."""
    optimizer.step(lr)
    model.update_router_bias()
    optimizer.zero_grad()


def discard_gradient(model: Transformer, optimizer: RoleOptimizer) -> None:
    """Leave parameters and router biases as they were, and forget the step's gradients and expert loads."""
    optimizer.zero_grad()
    model.forget_router_loads()


def nonfinite_gradients(model: Transformer) -> list[str]:
    """Names of the parameters whose gradients hold an infinity or a NaN."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(_values(parameter.grad)).all())
    ]


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
