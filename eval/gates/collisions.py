"""Which n-grams of some documents share table rows with other n-grams of the same documents.

Legend: N positions, H columns (orders * heads), K keys of one n-gram.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram.config import MemoryConfig

Ints = npt.NDArray[np.int64]


def ngram_numbers(
    keys_N: Ints, position_N: Ints, orders: Sequence[int], pad_key: int, stop_at_pad: bool
) -> dict[int, Ints]:
    """For each order, a number for each distinct n-gram of compressed ids that ends at a position: {order: int64 [N]}.

    `keys_N` are compressed ids, documents one after another, `position_N` their places in their documents. Before a
    document's start stand pads, and with `stop_at_pad` also everywhere before a pad (look-back `eos`).
    """
    keys = [keys_N]
    open_N = np.ones(len(keys_N), bool)
    for shift in range(1, max(orders)):
        older_N = np.roll(keys_N, shift)
        open_N = open_N & (position_N >= shift)
        if stop_at_pad:
            open_N &= older_N != pad_key
        keys.append(np.where(open_N, older_N, pad_key))
    stacked_NK = np.stack(keys, axis=1)
    return {order: np.unique(stacked_NK[:, :order], axis=0, return_inverse=True)[1].reshape(-1) for order in orders}


def ngrams_on_rows(addresses_NH: Ints, numbers: dict[int, Ints], num_heads: int) -> Ints:
    """How many distinct n-grams read the row that position n reads in column h, int64 [N, H]; 1: no collision."""
    columns = []
    for column in range(addresses_NH.shape[1]):
        number_N = numbers[list(numbers)[column // num_heads]]
        pairs = np.unique(np.stack([addresses_NH[:, column], number_N], axis=1), axis=0)
        rows, counts = np.unique(pairs[:, 0], return_counts=True)
        columns.append(counts[np.searchsorted(rows, addresses_NH[:, column])])
    return np.stack(columns, axis=1)


def compressed(tokens_N: Ints, config: MemoryConfig, table: Ints) -> tuple[Ints, int]:
    """Keys that a memory hashes for token ids, and the key of its pad; `table` is the vocabulary map."""
    return (table[tokens_N], int(table[config.pad_id])) if config.compression else (tokens_N, config.pad_id)
