"""Losses of n-gram language models on the token stream: what a model must beat to have learned more than counts.

Unigrams with add-one smoothing, bigrams and trigrams with interpolated, modified Kneser-Ney smoothing (Chen & Goodman
1998). They are counted on the train split and asked for exactly the targets that the model is asked for, with the
context that the model sees there: neither a document's nor a row's start is looked behind.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from engram.data.loader import Batch, validation_batches
from engram.data.packing import IGNORE
from engram.data.shards import Dataset

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Discounts of counts 1, 2 and more where the data is too small to estimate them (KenLM's fallback).
_FALLBACK = (0.5, 1.0, 1.5)
# Tokens counted at once, and tokens counted at most: about 4 GB of trigrams.
_CHUNK, MAX_TRAIN_TOKENS = 2**22, 2**27
# Part of the cache's key: to be changed with the method.
_METHOD = "add-one unigram, interpolated modified Kneser-Ney bigram and trigram; version 1"


@dataclass(frozen=True)
class Baselines:
    """Mean loss in nats per target of each n-gram model, and what it was measured on."""

    unigram: float
    bigram: float
    trigram: float
    targets: int
    train_tokens: int


@dataclass(frozen=True)
class Counts:
    """N-grams as ascending int64 keys, whose digits of base V are the tokens, oldest first; how often each occurs."""

    keys: Ints
    counts: Ints

    def merge(self, other: "Counts") -> "Counts":
        keys, inverse = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, inverse, np.concatenate([self.counts, other.counts]))
        return Counts(keys, counts)


def count_ngrams(tokens: Ints, ages: Ints, order: int, vocab_size: int) -> Counts:
    """Count n-grams that lie within one document; `ages` [N] is each token's position in its document."""
    whole = ages[order - 1 :] >= order - 1
    keys = np.zeros(int(whole.sum()), np.int64)
    for offset in range(order):
        column = tokens[offset : len(tokens) - order + 1 + offset]
        keys = keys * vocab_size + column[whole]
    return Counts(*np.unique(keys, return_counts=True))


@dataclass(frozen=True)
class _Level:
    """One order: p(w|c) = discounted[cw] + backoff[c] p(w|shorter c); absent: 0 and 1."""

    keys: Ints
    discounted: Floats
    contexts: Ints
    backoff: Floats

    @classmethod
    def from_counts(cls, counted: Counts, vocab_size: int) -> "_Level":
        contexts, first, inverse = np.unique(counted.keys // vocab_size, return_index=True, return_inverse=True)
        totals = np.add.reduceat(counted.counts, first).astype(np.float64)
        removed = discounts(counted.counts)[np.minimum(counted.counts, 3) - 1]
        return cls(
            counted.keys,
            (counted.counts - removed) / totals[inverse],
            contexts,
            np.add.reduceat(removed, first) / totals,
        )


def discounts(counts: Ints) -> Floats:
    """Discounts [3] of counts 1, 2 and >= 3, from how many n-grams occur 1, 2, 3 and 4 times."""
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if min(n1, n2, n3, n4) == 0:
        return np.array(_FALLBACK)
    ratio = n1 / (n1 + 2 * n2)
    estimated = (1 - 2 * ratio * n2 / n1, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3)
    return np.array([d if 0 < d < k else f for k, (d, f) in enumerate(zip(estimated, _FALLBACK, strict=True), start=1)])


class KneserNey:
    """Interpolated modified Kneser-Ney of order len(raw) + 1.

    `raw` holds the counts of orders 2, 3, ... n. Below order n an n-gram counts as often as it has different left
    neighbours; below order 1 stands the uniform distribution, so every token has a probability and they sum to 1.
    """

    def __init__(self, raw: list[Counts], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        lower = [
            Counts(*np.unique(above.keys % vocab_size**order, return_counts=True))
            for order, above in enumerate(raw, start=1)
        ]
        self._levels = [_Level.from_counts(counted, vocab_size) for counted in [*lower, raw[-1]]]

    def probabilities(self, histories: Ints, targets: Ints) -> Floats:
        """p(target | history) [P] for `histories` [P, order - 1], oldest token first."""
        probability = np.full(len(targets), 1 / self.vocab_size)
        context = np.zeros(len(targets), np.int64)
        for order, level in enumerate(self._levels):
            if order:
                context += histories[:, -order] * self.vocab_size ** (order - 1)
            found = _look_up(level.keys, level.discounted, context * self.vocab_size + targets, absent=0.0)
            probability = found + _look_up(level.contexts, level.backoff, context, absent=1.0) * probability
        return probability


def _look_up(keys: Ints, values: Floats, wanted: Ints, absent: float) -> Floats:
    if not len(keys):
        return np.full(len(wanted), absent)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], absent)


def count_dataset(dataset: Dataset, vocab_size: int, tokens: int) -> list[Counts]:
    """Counts of bigrams and of trigrams over the first `tokens` tokens of a split."""
    empty = np.zeros(0, np.int64)
    totals = {2: Counts(empty, empty), 3: Counts(empty, empty)}
    starts = np.asarray(dataset.documents, np.int64)
    for begin in range(0, tokens, _CHUNK):
        # The two tokens before a chunk complete the n-grams that end in it.
        first = max(begin - 2, 0)
        window = np.asarray(dataset.window(first, min(begin + _CHUNK, tokens) - first), np.int64)
        positions = np.arange(first, first + len(window))
        ages = positions - starts[np.searchsorted(starts, positions, side="right") - 1]
        for order, total in totals.items():
            skip = max(begin - first - order + 1, 0)
            totals[order] = total.merge(count_ngrams(window[skip:], ages[skip:], order, vocab_size))
    return list(totals.values())


def queries(batches: Iterable[Batch]) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Histories [P, 2], targets [P], and whether the older history token belongs to the target's document and row."""
    histories, targets, complete = [], [], []
    for batch in batches:
        tokens, wanted, documents = (
            tensor.cpu().numpy().astype(np.int64) for tensor in (batch.tokens, batch.targets, batch.document_ids)
        )
        older = np.zeros_like(tokens)
        older[:, 1:] = tokens[:, :-1]
        whole = np.zeros(tokens.shape, bool)
        whole[:, 1:] = documents[:, 1:] == documents[:, :-1]
        asked = wanted != IGNORE
        histories.append(np.stack([older[asked], tokens[asked]], axis=1))
        targets.append(wanted[asked])
        complete.append(whole[asked])
    return np.concatenate(histories), np.concatenate(targets), np.concatenate(complete)


def measure(folder: str | Path, sequence_length: int, max_tokens: int | None) -> Baselines:
    """Baselines on the first `max_tokens` validation tokens (None: all) of a prepared folder, cut into a model's rows.

    A result is kept beside the data as `ngram_<key>.json`, the key being a digest of shards, method and arguments.
    Raises DataError.
    """
    train, validation = Dataset(folder, "train", verify=True), Dataset(folder, "validation")
    shards = {name: record.sha256 for name, record in train.manifest.files.items() if name.endswith((".bin", ".idx"))}
    question = [_METHOD, MAX_TRAIN_TOKENS, sequence_length, max_tokens, sorted(shards.items())]
    key = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16]
    path = Path(folder) / f"ngram_{key}.json"
    # A cache that is not there, or broken, costs a recount, nothing else.
    with contextlib.suppress(OSError, ValueError):
        return TypeAdapter(Baselines).validate_json(path.read_bytes())
    batches = validation_batches(validation, sequence_length, 64, max_tokens)
    result = score(train, batches, train.vocab_size)
    temporary = path.with_suffix(f".{os.getpid()}")
    # So does a folder that may only be read.
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(asdict(result), indent=2) + "\n")
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    return result


def score(train: Dataset, batches: Iterable[Batch], vocab_size: int) -> Baselines:
    """Count on `train`, then ask for every target of the validation `batches`."""
    train_tokens = min(train.num_tokens, MAX_TRAIN_TOKENS)
    raw = count_dataset(train, vocab_size, train_tokens)
    histories, targets, complete = queries(batches)
    bigram = KneserNey(raw[:1], vocab_size).probabilities(histories[:, 1:], targets)
    # Where a row or a document leaves only one token of context, the trigram model is the bigram model.
    trigram = np.where(complete, KneserNey(raw, vocab_size).probabilities(histories, targets), bigram)
    unigram = add_one(raw[0], vocab_size)[targets]
    losses = [-float(np.log(probabilities).mean()) for probabilities in (unigram, bigram, trigram)]
    return Baselines(losses[0], losses[1], losses[2], len(targets), train_tokens)


def add_one(bigrams: Counts, vocab_size: int) -> Floats:
    """Unigram probabilities [V] of targets, which are the last tokens of bigrams, each counted once more than seen."""
    frequency = 1 + np.bincount(bigrams.keys % vocab_size, weights=bigrams.counts, minlength=vocab_size)
    return frequency / frequency.sum()
