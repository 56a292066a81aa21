"""What a training sequence holds: windows over the packed stream, their order, their document ids and targets."""

import numpy as np
from numpy.typing import NDArray

from engram.data.errors import DataError
from engram.data.shards import Dataset
from engram.kernels.linear_cross_entropy import IGNORE


class WindowOrder:
    """The endless stream of training windows: epoch after epoch, each in another order and from another offset.

    An epoch cuts the stream of tokens into windows of `sequence_length` inputs (and one more token for the last
    target), starting at a random offset below `sequence_length`, and visits each once. So each epoch sets the
    boundaries between windows elsewhere, and leaves out fewer than 2 `sequence_length` tokens, other ones each time.
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int) -> None:
        check_length(dataset, sequence_length)
        self._sequence_length, self._seed = sequence_length, seed
        self.windows_per_epoch = max(1, dataset.num_tokens // sequence_length - 1)
        spare = dataset.num_tokens - 1 - self.windows_per_epoch * sequence_length
        self._offsets = 1 + min(spare, sequence_length - 1)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def starts(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions of the windows number `first` to `first + count - 1` of the endless stream."""
        epochs, places = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.empty(count, np.int64)
        needed = {int(epoch): self._epoch(int(epoch)) for epoch in np.unique(epochs)}
        for epoch, order in needed.items():
            starts[epochs == epoch] = order[places[epochs == epoch]]
        self._epochs = needed
        return starts

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._epochs:
            return self._epochs[epoch]
        # Sorting a bit generator's raw numbers: unlike Generator.permutation, the same in every version of numpy.
        bits = np.random.PCG64(np.random.SeedSequence((self._seed, epoch)))
        offset = bits.random_raw() % self._offsets
        order = np.argsort(bits.random_raw(self.windows_per_epoch), kind="stable")
        return order * self._sequence_length + offset


def pack(
    dataset: Dataset, starts: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens, targets and document ids of the windows at `starts`, each int64 [len(starts), sequence_length].

    A target is the next token, and -100 where that belongs to another document. Document ids count from 0 in each row.
    """
    tokens = dataset.windows(starts, sequence_length + 1)
    positions = starts[:, None] + np.arange(sequence_length + 1)
    documents = np.searchsorted(dataset.documents, positions, side="right")
    targets = np.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], IGNORE)
    return tokens[:, :-1], targets, documents[:, :-1] - documents[:, :1]


def check_length(dataset: Dataset, sequence_length: int) -> None:
    """Raise DataError where the split holds less than one sequence."""
    if dataset.num_tokens <= sequence_length:
        raise DataError(
            f"{dataset.folder}: the {dataset.split} split has {dataset.num_tokens:,} tokens, but one sequence of "
            f"data.sequence_length {sequence_length:,} needs {sequence_length + 1:,}: shorten it, or prepare more text"
        )
