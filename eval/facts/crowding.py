"""Learned facts whose rows of the memory are shared with much else, against facts whose rows are nearly their own.

The hash sends many n-grams to one row. The crowding of a fact is the share of reads of its longest n-gram's rows, over
the whole training text, that come from other n-grams:

    crowding = 1 - reads of the n-gram / reads of its row, mean over the heads of the longest order

Legend: N positions or facts, H columns of the longest order in all memory layers, B rows of a batch, T tokens.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from engram.data.world import World, documents
from eval.facts.questions import Question, ask
from eval.loading import Loaded
from eval.padding import padded_batches
from eval.results import Item
from eval.sensitivity.interventions import memory_of

Ints = npt.NDArray[np.int64]
TASK = "collision"
GROUPS = ("crowded", "alone")
# Odd, so that products of int64 keep all bits.
_MIX = 0x9E3779B97F4A7C1


def crowded_items(loaded: Loaded, world: World, items: Sequence[Item]) -> list[Item]:
    """`collision`: the accuracies of `local_fact` among `items`, of the most and the least crowded third of each level.

    Both groups have equally many facts of each level, so that exposure cannot tell them apart. Raises UserError for a
    model without memory.
    """
    asked = ask(world, ("local_fact",))
    right = {item.id: item.value for item in items if item.task == "local_fact" and item.metric == "accuracy"}
    shares = crowding(loaded, list(documents(world)), [question.prompt for question in asked])
    found: list[Item] = []
    for _, level in groupby(zip(asked, shares.tolist(), strict=True), key=lambda pair: pair[0].group):
        ranked: list[Question] = [question for question, _ in sorted(level, key=lambda pair: -pair[1])]
        third = len(ranked) // 3
        for group, chosen in zip(GROUPS, (ranked[:third], ranked[len(ranked) - third :]), strict=True):
            found += [Item(TASK, question.id, "accuracy", right[question.id], group) for question in chosen]
    return found


def crowding(loaded: Loaded, texts: Sequence[str], prompts: Sequence[str]) -> npt.NDArray[np.float64]:
    """The crowding [N] of the n-grams that end the prompts, among all reads of training texts, which hold them."""
    reads: Ints = np.zeros(0, np.int64)
    numbers = []
    # All texts, but not all addresses, are in memory at once.
    for start in range(0, len(texts), 1024):
        addresses_NH = _addresses(loaded, texts[start : start + 1024], last=False)
        counted = np.bincount(addresses_NH.ravel(), minlength=len(reads))
        counted[: len(reads)] += reads
        reads = counted
        numbers.append(_number(addresses_NH))
    wanted_NH = _addresses(loaded, prompts, last=True)
    seen, counts = np.unique(np.concatenate(numbers), return_counts=True)
    own_N = counts[np.searchsorted(seen, _number(wanted_NH))]
    return 1 - (own_N[:, None] / reads[wanted_NH]).mean(1)


def _addresses(loaded: Loaded, texts: Sequence[str], last: bool) -> Ints:
    """Rows that the longest n-grams read, of every position (in any order) or of each text's last, int64 [N, H].

    Layers are told apart by adding the sizes of the tables before.
    """
    config, hasher = memory_of(loaded.model), loaded.model.hasher
    assert hasher is not None
    ids = loaded.tokenizer.encode_batch(list(texts))
    found: list[tuple[int, Ints]] = []
    parts: list[Ints] = []
    for batch in padded_batches(ids, 1 << 16, loaded.model.head.weight.device):
        columns, before = [], 0
        for layer, ids_BTH in loaded.model.hash_ids(batch.tokens_BT).items():
            columns.append(ids_BTH[..., -config.num_heads :] + before)
            before += hasher.num_rows[layer]
        addresses_BTH = torch.cat(columns, dim=-1)
        if last:
            ends_B = batch.real_BT.sum(1) - 1
            rows = addresses_BTH[torch.arange(len(ends_B), device=ends_B.device), ends_B].cpu().numpy()
            found += zip(batch.indices, rows, strict=True)
        else:
            parts.append(addresses_BTH[batch.real_BT].cpu().numpy())
    return np.stack([row for _, row in sorted(found, key=lambda pair: pair[0])]) if last else np.concatenate(parts)


def _number(addresses_NH: Ints) -> Ints:
    """One number for each n-gram, from the rows of all its heads together."""
    state = np.zeros(len(addresses_NH), np.int64)
    with np.errstate(over="ignore"):
        for column in addresses_NH.T:
            state = (state ^ column) * np.int64(_MIX)
            state ^= state >> np.int64(29)
    return state
