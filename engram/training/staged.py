"""A step's rows, at hand before the first forward pass: batches in, hash ids out to wherever rows are stored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from engram.memory.staging import HashIds, TableSteps
from engram.model.evaluation import TokenBatch, to_device
from engram.model.transformer import Transformer

AnyBatch = TypeVar("AnyBatch", bound=TokenBatch)


@dataclass
class StagedRows:
    """`TableSteps` of batches. `tables` None: every row of every table is at hand, and there is nothing to do."""

    model: Transformer
    tables: TableSteps | None
    device: torch.device
    # The batch that was prefetched, and its ids: they are hashed once.
    _ahead: tuple[TokenBatch, HashIds] | None = None

    def begin(self, batch: TokenBatch, following: Callable[[], TokenBatch] | None = None) -> None:
        """Forward passes over parts of `batch` come next, and after its step those over `following`."""
        if self.tables is None:
            return
        ahead = self._ahead
        self.tables.begin(ahead[1] if ahead is not None and ahead[0] is batch else self._hash_ids(batch))
        if following is not None:
            coming = following()
            self._ahead = coming, self._hash_ids(coming)
            self.tables.prefetch(self._ahead[1])

    def each(self, batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
        """The batches, each with its rows at hand."""
        for batch in batches:
            self.begin(batch)
            yield batch

    def finish(self) -> None:
        """Leave the tables' gradients with whoever owns the rows."""
        if self.tables is not None:
            self.tables.finish()

    def updated(self) -> None:
        """The optimizer has moved rows."""
        if self.tables is not None:
            self.tables.updated()

    def flush(self) -> None:
        """Wait until everything that was moved is stored."""
        if self.tables is not None:
            self.tables.flush()

    def measures(self) -> dict[str, float]:
        """What the last step asked of the tables: further keys of metrics.jsonl."""
        return {} if self.tables is None else self.tables.measures()

    def _hash_ids(self, batch: TokenBatch) -> HashIds:
        tokens, _, document_ids = to_device(batch, self.device)
        return self.model.hash_ids(tokens, document_ids)
