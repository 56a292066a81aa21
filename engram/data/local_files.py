"""Documents from the user's own files: .txt (a file each), .jsonl (a line each) and .parquet (a row each)."""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from engram.data.documents import Document
from engram.data.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 1024


def find_files(path: str) -> list[Path]:
    """Files that a path, a folder (with its subfolders) or a glob names, sorted. Raises DataError where none is."""
    given = Path(path).expanduser()
    if given.is_dir():
        files = [file for file in given.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    else:
        files = [file for file in map(Path, glob.glob(str(given), recursive=True)) if file.is_file()]
    if not files:
        raise DataError(f"data.sources path {path!r}: no {', '.join(SUFFIXES)} file matches: correct the path or glob")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(
                f"{file}: files of documents are {', '.join(SUFFIXES)}, not {file.suffix or 'without suffix'}"
            )
    return sorted(files)


def listing_digest(path: str) -> str | None:
    """sha256 over names and sizes of the files of `find_files`; None where there are none (any more)."""
    try:
        files = find_files(path)
    except DataError:
        return None
    return hashlib.sha256("\n".join(f"{file}\t{file.stat().st_size}" for file in files).encode()).hexdigest()


def read_files(files: list[Path], text_key: str) -> Iterator[Document]:
    """Documents of the files, in order, one held at a time. Raises DataError: file, place, what to do."""
    for file in files:
        try:
            if file.suffix == ".txt":
                yield _read_txt(file)
            elif file.suffix == ".jsonl":
                yield from _read_jsonl(file, text_key)
            else:
                yield from _read_parquet(file, text_key)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _read_txt(file: Path) -> Document:
    return Document(_decode(file.read_bytes(), file, 0), {"origin": str(file)})


def _read_jsonl(file: Path, text_key: str) -> Iterator[Document]:
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode(line, file, offset)
            offset += len(line)
            if not text.strip():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: is not JSON ({error}): a .jsonl file has one JSON object per line") from None
            if not isinstance(record, dict) or text_key not in record:
                keys = ", ".join(map(repr, record)) if isinstance(record, dict) else f"it is a {type(record).__name__}"
                raise DataError(
                    f"{place}: has no key {text_key!r} ({keys}): set text_key of the source to the text's key"
                )
            if not isinstance(record[text_key], str):
                kind = type(record[text_key]).__name__
                raise DataError(f"{place}: {text_key!r} is of type {kind}, not text: set text_key of the source")
            yield Document(record[text_key], {"origin": place})


def _read_parquet(file: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: is not a parquet file, or cut short: {error}") from None
    with table:
        columns = table.schema_arrow
        if text_key not in columns.names:
            names = ", ".join(map(repr, columns.names))
            raise DataError(f"{file}: has no column {text_key!r} ({names}): set text_key of the source")
        kind = columns.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{file}: column {text_key!r} holds {kind}, not strings: set text_key of the source")
        row = 0
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[text_key]):
            # As bytes: parquet promises that strings are UTF-8, but nobody checks it.
            for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                if data is None:
                    raise DataError(f"{file}: row {row} has no {text_key!r} (null): fill it, or drop the row")
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file}: row {row} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}: "
                        "repair or drop the row"
                    ) from None
                yield Document(text, {"origin": f"{file}: row {row}"})
                row += 1


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}: "
            "convert the file (for example with iconv -t UTF-8)"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text
