"""Loss of a model on a prepared split: the exact mean over its targets, in nats and in bits per byte of text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.data.loader import Batch, validation_batches
from engram.data.shards import Dataset
from engram.data.tokenizer import REPLACEMENT, Tokenizer
from engram.model.evaluation import validation_loss
from engram.model.transformer import IGNORE, Transformer


@dataclass(frozen=True)
class Perplexity:
    """Mean loss in nats over `targets` tokens, which stand for `bytes` bytes of text."""

    loss: float
    targets: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as the loss per token is not."""
        return bits_per_byte(self.loss, self.targets, self.bytes)


def bits_per_byte(loss: float, targets: int, num_bytes: int) -> float:
    """A mean loss in nats per target as bits per byte of the targets' text."""
    return loss * targets / (math.log(2) * num_bytes)


def measure_split(
    model: Transformer,
    tokenizer: Tokenizer,
    dataset: Dataset,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
) -> Perplexity:
    """Score the first `max_tokens` tokens of a split (None: all), cut into rows as in training."""
    return measure(model, validation_batches(dataset, sequence_length, batch_size, max_tokens), count_bytes(tokenizer))


def measure(model: Transformer, batches: Iterable[Batch], token_bytes: npt.NDArray[np.int64]) -> Perplexity:
    """Score every target of `batches` that is not -100, each batch in one forward pass."""
    targets = num_bytes = 0

    def counted() -> Iterator[Batch]:
        nonlocal targets, num_bytes
        for batch in batches:
            wanted = batch.targets[batch.targets != IGNORE].numpy()
            targets += len(wanted)
            num_bytes += int(token_bytes[wanted].sum())
            yield batch

    return Perplexity(validation_loss(model, counted(), model.head.weight.device), targets, num_bytes)


def count_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of text that each token id stands for, int64 [V]; 0 for the marks of a document's start and end."""
    counts = np.array(
        [_bytes_of(text, raw) for text, raw in zip(tokenizer.texts(), tokenizer.raw_tokens(), strict=True)], np.int64
    )
    counts[[mark for mark in (tokenizer.eos_id, tokenizer.bos_id) if mark is not None]] = 0
    return counts


def _bytes_of(text: str, raw: str) -> int:
    if REPLACEMENT not in text:
        return len(text.encode())
    # A piece of a character: one byte by name (<0xE2>), or one letter for each byte.
    return 1 if raw.startswith("<0x") else len(raw)
