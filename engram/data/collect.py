"""From sources to the kept documents: without empty ones and duplicates, ordered and split by their digests."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram.config import SourceConfig
from engram.data.corpora import Source, open_sources
from engram.data.documents import keyed_fraction, text_digest
from engram.data.errors import DataError
from engram.data.manifest import SourceRecord
from engram.data.progress import Progress


class Collection:
    """The kept documents of all sources, spooled into one file.

    Each document has a key in [0, 1), drawn from (`split_seed`, digest). Documents are ordered by key, so that sources
    mix; those below `validation_fraction` are the validation split.
    """

    def __init__(self, spool: Path, split_seed: int, validation_fraction: float) -> None:
        self._path, self._file = spool, spool.open("wb")
        self._split_key, self._validation_fraction = f"split {split_seed}", validation_fraction
        self._seen: set[bytes] = set()
        self._digests: list[bytes] = []
        self._keys: list[float] = []
        self._offsets = [0]
        self._characters: list[int] = []
        self._sources: list[int] = []
        self.records: list[SourceRecord] = []

    def add(self, source: Source, fraction: float, progress: Progress) -> None:
        """Read a source to its end. Raises DataError where nothing of it can be used."""
        read = empty = duplicates = left_out = 0
        first = len(self._digests)
        with progress.bar(f"reading {source.name}") as advance:
            for document in source.read():
                read += 1
                try:
                    data = document.text.encode()
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"{document.meta['origin']}: character {error.start} is half of a surrogate pair, not text: "
                        "repair or drop the document"
                    ) from None
                advance(len(data))
                digest = text_digest(document.text)
                if not document.text or document.text.isspace():
                    empty += 1
                elif digest in self._seen:
                    duplicates += 1
                elif keyed_fraction("fraction", digest) >= fraction:
                    left_out += 1
                else:
                    self._seen.add(digest)
                    self._keep(data, digest, len(document.text))
        kept = len(self._digests) - first
        if not kept:
            raise DataError(
                f"source {source.name!r}: none of its {read:,} documents can be used ({empty:,} empty, "
                f"{duplicates:,} duplicates, {left_out:,} left out by its fraction {fraction:g}): drop the source, or "
                "give it text of its own"
            )
        record = SourceRecord(
            name=source.name,
            licence=source.licence,
            origin=source.origin,
            packages=source.packages,
            documents_read=read,
            empty=empty,
            duplicates=duplicates,
            left_out=left_out,
            documents=kept,
            characters=sum(self._characters[first:]),
            bytes=self._offsets[-1] - self._offsets[first],
            tokens=0,
            digest=hashlib.sha256(b"".join(self._digests[first:])).hexdigest(),
        )
        self.records.append(record)

    def close(self) -> None:
        """No more sources: order and split. Raises DataError where a split stays empty."""
        self._file.close()
        keys = np.array(self._keys)
        self.order: NDArray[np.int64] = np.argsort(keys, kind="stable")
        self.num_validation = int((keys < self._validation_fraction).sum())
        self.num_train = len(keys) - self.num_validation
        for split, count in (("validation", self.num_validation), ("train", self.num_train)):
            if not count:
                raise DataError(
                    f"the {split} split is empty: with data.validation_fraction {self._validation_fraction:g} and this "
                    f"data.split_seed all {len(keys):,} documents fall into the other split (a document is never "
                    "divided): give more documents, or change one of the two"
                )

    def _keep(self, data: bytes, digest: bytes, characters: int) -> None:
        self._file.write(data)
        self._digests.append(digest)
        self._keys.append(keyed_fraction(self._split_key, digest))
        self._offsets.append(self._offsets[-1] + len(data))
        self._characters.append(characters)
        self._sources.append(len(self.records))

    @property
    def train(self) -> NDArray[np.int64]:
        """Numbers of the training documents, in order."""
        return self.order[self.num_validation :]

    @property
    def validation(self) -> NDArray[np.int64]:
        return self.order[: self.num_validation]

    def texts(self, numbers: NDArray[np.int64]) -> Iterator[str]:
        """Texts of documents by number."""
        with self._path.open("rb") as file:
            for number in numbers:
                file.seek(self._offsets[number])
                yield file.read(self.size(number)).decode()

    def characters(self, numbers: NDArray[np.int64]) -> int:
        return int(np.array(self._characters)[numbers].sum())

    def size(self, number: int) -> int:
        """Bytes of the document."""
        return self._offsets[number + 1] - self._offsets[number]

    def digest(self, number: int) -> bytes:
        return self._digests[number]

    def source(self, number: int) -> int:
        """Index of the document's source in `records`."""
        return self._sources[number]


def collect(
    configs: tuple[SourceConfig, ...], cache: Path, spool: Path, split_seed: int, fraction: float, progress: Progress
) -> Collection:
    """Open and read all sources; the first of several equal documents stays. Raises DataError."""
    opened = [(source, config.fraction) for config in configs for source in open_sources(config, cache, progress)]
    collection = Collection(spool, split_seed, fraction)
    for source, share in opened:
        collection.add(source, share, progress)
    collection.close()
    return collection
