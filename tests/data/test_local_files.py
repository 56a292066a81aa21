import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from engram.data.errors import DataError
from engram.data.local_files import find_files, listing_digest, read_files


def texts_of(path: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in read_files(find_files(str(path)), text_key)]


def test_txt_is_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\n é".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "ignored.md").write_text("no")
    documents = list(read_files(find_files(str(tmp_path)), "text"))
    assert [document.text for document in documents] == ["zwei\r\n é", "one"]
    assert documents[1].meta["origin"] == str(tmp_path / "sub" / "a.txt")


def test_globs(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / "a*.txt") == ["a1.txt", "a2.txt"]
    assert texts_of(tmp_path / "**" / "*1.txt") == ["a1.txt", "b1.txt"]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one\\n1"}\n\n{"body": "two", "n": 2}\n{"body": ""}')
    documents = list(read_files([file], "body"))
    assert [document.text for document in documents] == ["one\n1", "two", ""]
    assert documents[1].meta["origin"] == f"{file}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:2: is not JSON"),
        (b'{"body": "x"}', r"a\.jsonl:2: has no key 'text' \('body'\): set text_key"),
        (b'["x"]', r"a\.jsonl:2: has no key 'text' \(it is a list\)"),
        (b"[" * 100_000, r"a\.jsonl:2: is not JSON \(maximum recursion depth"),
        (b'{"text": 5}', r"a\.jsonl:2: 'text' is of type int, not text"),
        (b'{"text": "\xff"}', r"a\.jsonl: is not UTF-8: byte 0xff at offset 28:"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "first"}' + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(read_files([file], "text"))


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    rows = [f"row {number}" for number in range(2500)]
    table = pyarrow.table({"n": range(2500), "body": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents = list(read_files([tmp_path / "a.parquet"], "body"))
    assert [document.text for document in documents] == rows
    assert documents[2000].meta["origin"].endswith("a.parquet: row 2000")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"has no column 'text' \('body'\): set text_key"),
        ({"text": [1]}, "column 'text' holds int64, not strings"),
        ({"text": ["x", None]}, r"row 1 has no 'text' \(null\)"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "a.parquet")


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    data = pyarrow.array([b"caf\xc3\xa9", b"caf\xe9"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, data.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1 is not UTF-8: byte 0xe9 at offset 3: repair or drop"):
        texts_of(tmp_path)


def test_truncated_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 100}), file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: is not a parquet file, or cut short"):
        texts_of(file)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8: byte 0xe9 at offset 3: convert"):
        texts_of(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "*.txt", tmp_path / "none.txt"):
        with pytest.raises(DataError, match=r"no \.txt, \.jsonl, \.parquet file matches"):
            find_files(str(path))


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: files of documents are .*, not \.csv"):
        find_files(str(tmp_path / "a.csv"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        texts_of(tmp_path)


def test_listing_digest_follows_names_and_sizes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert listing_digest(str(file)) is None
    file.write_text(json.dumps({"text": "one"}))
    first = listing_digest(str(file))
    file.write_text(json.dumps({"text": "one more"}))
    assert first != listing_digest(str(file))
    file.write_text(json.dumps({"text": "two"}))
    assert first == listing_digest(str(file))
