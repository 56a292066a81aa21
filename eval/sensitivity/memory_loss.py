"""What each token's prediction costs with and without memory, and how often training saw the n-gram before it.

Legend: R runs, N targets of all documents in their order, D documents, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.data.loader import Loader
from engram.data.shards import Dataset
from engram.model.transformer import IGNORE, Transformer
from eval.bootstrap import Interval, means, resampled_means
from eval.loading import Loaded
from eval.over_runs import Sample, over_runs
from eval.padding import padded_batches
from eval.sensitivity.interventions import memory_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]

# How often training saw an n-gram: names of the bins and their upper ends.
BINS = {"never": 0, "once": 1, "2 to 9": 9, "10 to 99": 99, "100 or more": np.iinfo(np.int64).max}
# Training tokens in which n-grams are counted at most: a few minutes.
MAX_COUNTED = 2**27
# Odd: an n-gram's key is a polynomial of it, modulo 2^64. Two of ten million n-grams share one with a chance of 3e-6.
_BASE = 0x9E3779B97F4A7C1


@dataclass(frozen=True)
class LossChange:
    """Mean losses in nats per target with memory as it is and changed, over the targets of one bin.

    `rise` is their difference, `rise_bits` the same in bits per byte of text; intervals draw documents, and with
    several runs hold their spread too.
    """

    bin: str
    on: float
    off: float
    rise: Interval
    rise_bits: Interval
    documents: int
    targets: int


@torch.inference_mode()
def token_losses(model: Transformer, documents: Sequence[Sequence[int]], max_tokens: int = 8192) -> Floats:
    """Loss in nats of every token of each document but its first, each document on its own."""
    losses: list[Floats] = [np.empty(0)] * len(documents)
    for batch in padded_batches(documents, max_tokens, model.head.weight.device):
        targets_BT = torch.where(batch.real_BT, batch.tokens_BT, IGNORE)[:, 1:]
        losses_BT = model.token_losses(batch.tokens_BT[:, :-1], targets_BT.contiguous()).double().cpu().numpy()
        for row, index in enumerate(batch.indices):
            losses[index] = losses_BT[row, : len(documents[index]) - 1]
    return np.concatenate(losses)


def loss_changes(
    on_RN: Floats, off_RN: Floats, document_N: Ints, bytes_N: Ints, bin_N: Names, level: float = 0.9, seed: int = 0
) -> list[LossChange]:
    """The change over all targets ("all") and within each bin that has any."""
    found = []
    for name in ("all", *BINS):
        chosen = np.ones(len(bin_N), bool) if name == "all" else bin_N == name
        if not chosen.any():
            continue
        documents, unit = np.unique(document_N[chosen], return_inverse=True)
        rises_RD = [np.bincount(unit, rise_N[chosen]) for rise_N in off_RN - on_RN]
        counts_D, bytes_D = np.bincount(unit), np.bincount(unit, bytes_N[chosen])
        in_bits = [rise_D / np.log(2) for rise_D in rises_RD]
        found.append(
            LossChange(
                bin=name,
                on=float(on_RN[:, chosen].mean()),
                off=float(off_RN[:, chosen].mean()),
                rise=ratio_over_runs(rises_RD, [counts_D] * len(on_RN), level, seed),
                rise_bits=ratio_over_runs(in_bits, [bytes_D] * len(on_RN), level, seed),
                documents=len(documents),
                targets=int(chosen.sum()),
            )
        )
    return found


def ratio_over_runs(
    values: Sequence[npt.ArrayLike], weights: Sequence[npt.ArrayLike], level: float, seed: int
) -> Interval:
    """Mean over runs of sum(values) / sum(weights); all runs see the same draws of units."""
    pairs = zip(values, weights, strict=True)
    return over_runs([Sample(means(*pair), resampled_means(*pair, seed=seed)) for pair in pairs], level)


def frequency_bins(loaded: Loaded, training: Dataset, documents: Sequence[Sequence[int]]) -> Names:
    """For each target, how often training had seen the longest n-gram that memory reads before it: a name of `BINS`.

    N-grams are of compressed ids, as memory hashes them, whole within a document; they are counted in the tokens of
    the first `MAX_COUNTED` tokens of the training, in its order. Where less than an n-gram stands before a target,
    what there is counts.
    """
    order = memory_of(loaded.model).max_ngram_size
    table = _compressed_ids(loaded.model)
    asked_N = np.concatenate(
        [_keys(table[torch.tensor([list(document[:-1])])], None, order).ravel() for document in documents]
    )
    distinct, place_N = np.unique(asked_N, return_inverse=True)
    counts = np.zeros(len(distinct), np.int64)
    for tokens_BT, document_ids_BT in _training_tokens(loaded, training):
        keys = _keys(table[tokens_BT], document_ids_BT, order).ravel()
        places = np.searchsorted(distinct, keys).clip(max=len(distinct) - 1)
        counts += np.bincount(places[distinct[places] == keys], minlength=len(distinct))
    names = np.array(list(BINS))
    return names[np.searchsorted(list(BINS.values()), counts)][place_N]


def _training_tokens(loaded: Loaded, training: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and document ids of the batches up to the checkpoint."""
    data, train = loaded.config.data, loaded.config.train
    loader = Loader(training, data.sequence_length, train.batch_size, data.shuffle_seed, prefetch=0)
    for _ in range(min(loaded.step, MAX_COUNTED // (train.batch_size * data.sequence_length))):
        batch = next(loader)
        yield batch.tokens, batch.document_ids


def _compressed_ids(model: Transformer) -> Tensor:
    """Token id -> the id that memory hashes."""
    table = torch.tensor(model.vocabulary.table)
    return table if memory_of(model).compression else torch.arange(len(table))


def _keys(ids_BT: Tensor, document_ids_BT: Tensor | None, order: int) -> Ints:
    """A number for each n-gram of `order` ids that ends at each position, int64 [B, T]."""
    # From 1 on: 0 stands where a document has not begun.
    ids = ids_BT.numpy().astype(np.uint64) + np.uint64(1)
    documents = np.zeros(ids.shape, np.int64) if document_ids_BT is None else document_ids_BT.numpy()
    keys, factor = ids.copy(), 1
    for shift in range(1, min(order, ids.shape[1])):
        factor = factor * _BASE % 2**64
        same = documents[:, shift:] == documents[:, :-shift]
        keys[:, shift:] += np.where(same, ids[:, :-shift], np.uint64(0)) * np.uint64(factor)
    return keys.view(np.int64)
