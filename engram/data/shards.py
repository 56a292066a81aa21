"""Shards: flat files of token ids on disk, written once and memory-mapped ever after.

A shard holds whole documents, each closed by the end-of-document token. The shards of a split, one after the other, are
one stream of tokens; positions below count from its start.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram.data.errors import DataError
from engram.data.manifest import (
    PREPARE_AGAIN,
    FileRecord,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    file_digest,
    read_manifest,
)

# Tokens looked at in one go while ids are checked: bounds the memory.
_CHECKED_AT_ONCE = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits into it, otherwise uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Writes one split's documents into shards of at most `shard_tokens` tokens; a longer document fills one alone."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype, eos_id: int, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._eos_id, self._shard_tokens = eos_id, shard_tokens
        self._documents: list[NDArray] = []
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._shards: list[ShardRecord] = []

    def add(self, ids: Sequence[int], digest: bytes) -> int:
        """Append a document and its end token; returns the number of tokens written."""
        if self._documents and self._tokens + len(ids) + 1 > self._shard_tokens:
            self._flush()
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1], tokens[-1] = ids, self._eos_id
        self._documents.append(tokens)
        self._tokens += len(tokens)
        self._digest.update(digest)
        return len(tokens)

    def close(self) -> SplitRecord:
        """Write what is left."""
        if self._documents:
            self._flush()
        return SplitRecord(
            tokens=sum(shard.tokens for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            digest=self._digest.hexdigest(),
            shards=self._shards,
        )

    def _flush(self) -> None:
        stem = f"{self._split}_{len(self._shards):03d}"
        lengths = np.array([len(document) for document in self._documents])
        np.concatenate(self._documents).tofile(self._folder / f"{stem}.bin")
        with (self._folder / f"{stem}.idx").open("wb") as file:
            np.save(file, np.cumsum(lengths) - lengths)
        shard = ShardRecord(file=f"{stem}.bin", index=f"{stem}.idx", tokens=self._tokens, documents=len(lengths))
        self._shards.append(shard)
        self._documents, self._tokens = [], 0


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every file in a folder, each flushed to the disk first."""
    records = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        records[path.name] = FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
    return records


class Dataset:
    """One split of a prepared folder, memory-mapped.

    `documents` int64 [number of documents]: the position at which each starts. `verify` reads everything once and
    compares checksums and ids; sizes and the tokenizer's digest are always compared. Raises DataError.
    """

    def __init__(
        self, folder: str | Path, split: Split, *, verify: bool = False, vocab_size: int | None = None
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest: Manifest = read_manifest(folder)
        check_files(self.folder, self.manifest)
        if vocab_size is not None and vocab_size != self.manifest.tokenizer.vocab_size:
            raise DataError(
                f"{folder}: was prepared with {self.manifest.tokenizer.vocab_size:,} token ids, but model.vocab_size "
                f"is {vocab_size:,}: change model.vocab_size, or prepare another data.path"
            )
        record = self.manifest.splits[split]
        self.num_tokens = record.tokens
        lengths = np.array([shard.tokens for shard in record.shards], np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._shards = [_map_shard(self.folder / shard.file, self.manifest.dtype) for shard in record.shards]
        if verify:
            verify_folder(self.folder)
        starts = [_read_index(self.folder, shard) for shard in record.shards]
        self.documents: NDArray[np.int64] = np.concatenate(
            [index + start for index, start in zip(starts, self._starts, strict=True)]
        )

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        return self.manifest.tokenizer.eos_id

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """`length` tokens from position `start` on, int64."""
        return self.windows(np.array([start]), length)[0]

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """`length` tokens from each position on, int64 [len(starts), length]; windows may span shards."""
        positions = starts[:, None] + np.arange(length)
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_tokens):
            raise IndexError(f"window outside of the {self.num_tokens} tokens of {self.folder} ({self.split})")
        if len(self._shards) == 1:
            return self._shards[0][positions].astype(np.int64)
        shard_of = np.searchsorted(self._starts, positions, side="right") - 1
        tokens = np.empty(positions.shape, np.int64)
        for shard in np.unique(shard_of):
            inside = shard_of == shard
            tokens[inside] = self._shards[shard][positions[inside] - self._starts[shard]]
        return tokens


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file's presence and size, and the tokenizer's digest, with the manifest. Raises DataError."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: is missing, though the manifest lists it: {PREPARE_AGAIN}")
        if path.stat().st_size != record.bytes:
            raise DataError(
                f"{path}: has {path.stat().st_size:,} bytes, but the manifest says {record.bytes:,}: "
                f"the file was cut short or replaced; {PREPARE_AGAIN}"
            )
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        size = manifest.files[shard.file].bytes
        if size != shard.tokens * itemsize:
            raise DataError(
                f"{folder / shard.file}: has {size:,} bytes, but the manifest's {shard.tokens:,} tokens of "
                f"{manifest.dtype} are {shard.tokens * itemsize:,}: {PREPARE_AGAIN}"
            )
    tokenizer = folder / manifest.tokenizer.file
    if not tokenizer.is_file() or file_digest(tokenizer) != manifest.tokenizer.digest:
        raise DataError(
            f"{tokenizer}: is not the tokenizer that made the shards (sha256 {manifest.tokenizer.digest[:12]}...): "
            f"put that one back, or {PREPARE_AGAIN}"
        )


def verify_folder(folder: str | Path) -> Manifest:
    """Compare every file's size and checksum with the manifest, and every token id with the vocabulary.

    Raises DataError. Takes a second per GB: whoever is about to read the shards calls it once.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    for name, record in manifest.files.items():
        found = file_digest(folder / name)
        if found != record.sha256:
            raise DataError(
                f"{folder / name}: its sha256 is {found[:12]}..., but the manifest says {record.sha256[:12]}...: "
                f"the file changed; {PREPARE_AGAIN}"
            )
    for split in manifest.splits.values():
        for shard in split.shards:
            tokens = _map_shard(folder / shard.file, manifest.dtype)
            for start in range(0, len(tokens), _CHECKED_AT_ONCE):
                outside = tokens[start : start + _CHECKED_AT_ONCE] >= manifest.tokenizer.vocab_size
                if outside.any():
                    position = start + int(outside.argmax())
                    raise DataError(
                        f"{folder / shard.file}: token {position:,} is {tokens[position]}, but ids end at "
                        f"{manifest.tokenizer.vocab_size - 1}: {PREPARE_AGAIN}"
                    )
    return manifest


def _read_index(folder: Path, shard: ShardRecord) -> NDArray[np.int64]:
    try:
        with (folder / shard.index).open("rb") as file:
            starts = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{folder / shard.index}: is not an array of positions ({error}): {PREPARE_AGAIN}") from None
    if starts.dtype != np.int64 or starts.shape != (shard.documents,):
        raise DataError(
            f"{folder / shard.index}: holds {starts.dtype} {list(starts.shape)}, but the shard has {shard.documents:,} "
            f"documents: {PREPARE_AGAIN}"
        )
    return starts


def _map_shard(path: Path, dtype: str) -> NDArray:
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
