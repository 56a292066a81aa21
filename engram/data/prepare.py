"""Build a folder of shards from the configured sources: read, split, train the tokenizer, encode, check, rename.

Everything is written into a hidden folder beside the target and renamed at the very end: a folder at `data.path` is a
finished one. A lock lets one process work while others wait and then find the result.
"""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram.config import Config
from engram.data.collect import Collection, collect
from engram.data.errors import DataError
from engram.data.folder import alone, check_replaceable, replace_folder
from engram.data.manifest import Manifest, Split, SplitRecord, TokenizerRecord, read_manifest
from engram.data.progress import Progress
from engram.data.settings import check_settings, content_settings
from engram.data.shards import ShardWriter, record_files, token_dtype, verify_folder
from engram.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from engram.data.tokenizer_training import excerpts, train_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

# Characters that are encoded in one go: enough for all threads, little beside the texts.
_ENCODED_AT_ONCE = 1 << 22


def prepare(config: Config, *, force: bool = False, console: "Console | None" = None) -> Path:
    """Make sure that `config.data.path` holds the shards that the config asks for, and return it.

    A finished folder that matches the settings is left as it is (its sources are not read again: only names and sizes
    of local files are compared). Progress is shown on `console`. Raises DataError, also where the folder was prepared
    with other settings, unless `force` replaces it.
    """
    folder, progress = Path(config.data.path).expanduser(), Progress(console)
    settings = content_settings(config)
    try:
        with alone(folder, progress):
            check_replaceable(folder)
            if not force and folder.exists() and any(folder.iterdir()):
                check_settings(folder, read_manifest(folder).settings, settings)
                verify_folder(folder)
                progress.say(f"{folder}: already prepared with these settings (--force prepares it again)")
                return folder
            work = folder.absolute().with_name(f".{folder.name}.preparing")
            # Left by a process that was killed: the lock says that nobody works in it.
            shutil.rmtree(work, ignore_errors=True)
            try:
                (work / "folder").mkdir(parents=True)
                manifest = _build(config, settings, work, progress)
                replace_folder(folder, work / "folder")
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason, remedy = (f"disk full: {error}", "free space, or ") if full else (f"{error}", "")
        raise DataError(f"{folder}: cannot be prepared: {reason}: {remedy}choose another data.path") from None
    splits = ", ".join(f"{split.tokens:,} tokens for {name}" for name, split in manifest.splits.items())
    progress.say(f"{folder}: prepared: {splits}")
    return folder


def _build(config: Config, settings: dict[str, Any], work: Path, progress: Progress) -> Manifest:
    data, folder, spool = config.data, work / "folder", work / "spool"
    cache = Path(data.cache).expanduser()
    # Before the corpus, which may take hours to read: a wrong path is told at once.
    tokenizer = _existing_tokenizer(config)
    collection = collect(data.sources, cache, spool, data.split_seed, data.validation_fraction, progress)
    tokenizer = tokenizer or _new_tokenizer(config, collection, progress)
    file = tokenizer.save(folder)
    splits, tokens = _write_shards(collection, tokenizer, folder, data.shard_tokens, progress)
    result = Manifest(
        settings=settings,
        tokenizer=TokenizerRecord(
            file=file.name,
            digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
        ),
        dtype="uint16" if token_dtype(tokenizer.vocab_size) == np.uint16 else "uint32",
        split_seed=data.split_seed,
        validation_fraction=data.validation_fraction,
        sources=[
            record.model_copy(update={"tokens": int(count)})
            for record, count in zip(collection.records, tokens, strict=True)
        ],
        splits=splits,
        files=record_files(folder),
    )
    result.save(folder)
    return result


def _write_shards(
    collection: Collection, tokenizer: Tokenizer, folder: Path, shard_tokens: int, progress: Progress
) -> tuple[dict[Split, SplitRecord], NDArray[np.int64]]:
    """Encode all documents; also returns the number of tokens of each source."""
    tokens = np.zeros(len(collection.records), np.int64)
    numbers: dict[Split, NDArray[np.int64]] = {"train": collection.train, "validation": collection.validation}
    splits: dict[Split, SplitRecord] = {}
    with progress.bar("encoding", sum(record.bytes for record in collection.records)) as advance:
        for split in numbers:
            dtype = token_dtype(tokenizer.vocab_size)
            writer = ShardWriter(folder, split, dtype, tokenizer.eos_id, shard_tokens)
            for batch, texts in _batches(collection, numbers[split]):
                for number, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    tokens[collection.source(number)] += writer.add(ids, collection.digest(number))
                    advance(collection.size(number))
            splits[split] = writer.close()
    return splits, tokens


def _existing_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of `data.tokenizer.path`, or None where one is to be trained."""
    path = config.data.tokenizer.path
    if path is None:
        return None
    try:
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, config.model.vocab_size, path)
    except DataError as error:
        raise DataError(f"data.tokenizer.path {error}") from None
    return tokenizer


def _new_tokenizer(config: Config, collection: Collection, progress: Progress) -> Tokenizer:
    """Trained on the training documents: validation text stays unseen."""
    choice, vocab_size = config.data.tokenizer, config.model.vocab_size
    with progress.bar(f"training tokenizer {vocab_size:,}") as advance:
        texts, total = collection.texts(collection.train), collection.characters(collection.train)

        def shown() -> Iterator[str]:
            for excerpt in excerpts(texts, total, choice.train_characters):
                advance(len(excerpt))
                yield excerpt

        return train_tokenizer(shown(), vocab_size, choice.character_coverage)


def _batches(collection: Collection, numbers: NDArray[np.int64]) -> Iterator[tuple[list[int], list[str]]]:
    batch: list[int] = []
    texts: list[str] = []
    characters = 0
    for number, text in zip(numbers.tolist(), collection.texts(numbers), strict=True):
        batch.append(number)
        texts.append(text)
        characters += len(text)
        if characters >= _ENCODED_AT_ONCE:
            yield batch, texts
            batch, texts, characters = [], [], 0
    if batch:
        yield batch, texts
