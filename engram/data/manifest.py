"""manifest.json: what a prepared folder holds, where it came from, and the settings that made it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engram.data.errors import DataError

NAME = "manifest.json"
Split = Literal["train", "validation"]
# How every complaint about a damaged folder ends.
PREPARE_AGAIN = "prepare again with python -m engram.data prepare CONFIG --force"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    bytes: int
    sha256: str


class ShardRecord(_Record):
    """One shard: a flat file of tokens, and a .npy of the int64 positions at which its documents start."""

    file: str
    index: str
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)


class SplitRecord(_Record):
    tokens: int
    documents: int
    # sha256 over the documents' digests, in order.
    digest: str
    shards: list[ShardRecord] = Field(min_length=1)


class SourceRecord(_Record):
    """One source: how many of its documents were read, left out and kept, and what those kept add up to."""

    name: str
    licence: str
    # Package and version, or the local path.
    origin: str
    # sha256 of each downloaded package file, by file name.
    packages: dict[str, str]
    documents_read: int
    empty: int
    duplicates: int
    # Left out because of the source's `fraction`.
    left_out: int
    documents: int
    characters: int
    bytes: int
    tokens: int
    # sha256 over the digests of the kept documents, in the order of reading.
    digest: str


class TokenizerRecord(_Record):
    file: str
    digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None


class Manifest(_Record):
    format_version: Literal[1] = 1
    # The settings that decide the content; `prepare` compares them.
    settings: dict[str, Any]
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "uint32"]
    split_seed: int
    validation_fraction: float
    sources: list[SourceRecord]
    splits: dict[Split, SplitRecord]
    # Every file of the folder but the manifest itself.
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for split in ("train", "validation"):
            if split not in self.splits:
                raise ValueError(f"splits.{split} is missing")
            record = self.splits[split]
            if record.tokens != sum(shard.tokens for shard in record.shards):
                raise ValueError(f"splits.{split}.tokens is not the sum over its shards")
            for name in (name for shard in record.shards for name in (shard.file, shard.index)):
                if name not in self.files:
                    raise ValueError(f"files.{name} is missing")
        return self

    def save(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> Manifest:
    """Read a prepared folder's manifest. Raises DataError where it is missing, cut short or of another format."""
    path = Path(folder) / NAME
    try:
        text = path.read_bytes()
    except OSError:
        raise DataError(
            f"{folder}: is not a prepared data folder ({NAME} is missing): run python -m engram.data prepare CONFIG"
        ) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(
            f"{path}: is cut short or not a manifest of format 1 ({where}: {message}): {PREPARE_AGAIN}"
        ) from None


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
