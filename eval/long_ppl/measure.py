"""LongPPL (Fang et al. 2024, arXiv 2410.23771): the perplexity of those tokens that need a long context.

    LSD_i = log P0(x_i | whole context) - log P0(x_i | short context),   LCL_i = log P0(x_i | whole context)
    token i is key where LSD_i > alpha and LCL_i > beta;   LongPPL = exp(mean loss of the key tokens)

P0 is one fixed evaluator. The short context slides: a window that starts at s = 0, d, 2d, ... is read as K + d tokens,
of which the last d are scored, so a token's short context has K to K + d - 1 tokens. The first K are never key.

Legend: N tokens of a document, W windows of a batch, T tokens of a row, S scored tokens (N - K).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.model.transformer import IGNORE
from eval.padding import padded_batches

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class LossModel(Protocol):
    """What a language model must tell: the loss of each target, float32 [W, T]; 0 where it is IGNORE."""

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Windows:
    """The short context: `window` is K, `stride` is d, in tokens."""

    window: int
    stride: int

    def places(self, documents: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """(document, start) of every window."""
        for index, document in enumerate(documents):
            for start in range(0, len(document) - self.window, self.stride):
                yield index, start


@dataclass(frozen=True)
class Losses:
    """An evaluator's losses of a document's tokens from K on, float64 [S] in nats, under either context."""

    short: Floats
    whole: Floats

    def key(self, alpha: float, beta: float) -> Mask:
        """Which of these tokens are key, [S]."""
        return (self.short - self.whole > alpha) & (-self.whole > beta)


@torch.inference_mode()
def whole_losses(
    model: LossModel,
    documents: Sequence[Sequence[int]],
    first: int,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> list[Floats]:
    """Losses of each document's tokens from `first` (at least 1) on, after all tokens before them."""
    found: list[Floats] = [np.empty(0)] * len(documents)
    for index, losses in _row_losses(model, documents, [first] * len(documents), max_tokens, device, advance):
        found[index] = losses
    return found


@torch.inference_mode()
def short_losses(
    model: LossModel,
    documents: Sequence[Sequence[int]],
    windows: Windows,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> list[Floats]:
    """Losses of each document's tokens from K on, after the tokens of their window alone; windows share batches."""
    found = [np.empty(max(0, len(document) - windows.window)) for document in documents]
    places = list(windows.places(documents))
    rows = [documents[index][start : start + windows.window + windows.stride] for index, start in places]
    for row, losses in _row_losses(model, rows, [windows.window] * len(rows), max_tokens, device, advance):
        index, start = places[row]
        found[index][start : start + len(losses)] = losses
    return found


def _row_losses(
    model: LossModel,
    rows: Sequence[Sequence[int]],
    firsts: Iterable[int],
    max_tokens: int,
    device: torch.device | str,
    advance: Callable[[int], None] | None,
) -> Iterator[tuple[int, Floats]]:
    """(place, losses of the row's tokens from its first scored one on), in no order."""
    starts = list(firsts)
    for batch in padded_batches(rows, max_tokens, device):
        targets_WT = batch.tokens_BT[:, 1:].masked_fill(~batch.real_BT[:, 1:], IGNORE)
        losses_WT = model.token_losses(batch.tokens_BT[:, :-1], targets_WT).double().cpu().numpy()
        for losses_T, index in zip(losses_WT, batch.indices, strict=True):
            # The loss of token i stands at i - 1.
            yield index, losses_T[starts[index] - 1 : len(rows[index]) - 1]
        if advance is not None:
            advance(sum(len(rows[index]) for index in batch.indices))


@dataclass(frozen=True)
class LongPpl:
    """Sums over a corpus: losses and numbers of the key tokens by document, and of all tokens from K on."""

    key_sums: Floats
    key_counts: Floats
    all_sums: Floats
    all_counts: Floats

    @property
    def long_ppl(self) -> float:
        """Every key token weighs the same; NaN where there is none."""
        return _perplexity(self.key_sums, self.key_counts)

    @property
    def ppl(self) -> float:
        """Of all tokens from K on."""
        return _perplexity(self.all_sums, self.all_counts)

    @property
    def key_tokens(self) -> int:
        return int(self.key_counts.sum())

    @property
    def key_rate(self) -> float:
        return float(self.key_counts.sum() / self.all_counts.sum())


def long_ppl(losses: Sequence[Floats], masks: Sequence[Mask]) -> LongPpl:
    """A model's losses of each document's tokens from K on, and which of these tokens are key."""
    return LongPpl(
        key_sums=np.array([float(loss[mask].sum()) for loss, mask in zip(losses, masks, strict=True)]),
        key_counts=np.array([float(mask.sum()) for mask in masks]),
        all_sums=np.array([float(loss.sum()) for loss in losses]),
        all_counts=np.array([float(len(loss)) for loss in losses]),
    )


def _perplexity(sums: Floats, counts: Floats) -> float:
    total = float(counts.sum())
    return float(np.exp(sums.sum() / total)) if total else float("nan")
