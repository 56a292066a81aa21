import hashlib
import json
from pathlib import Path

import pytest

from engram.data.errors import DataError
from engram.data.manifest import NAME, file_digest, read_manifest
from tests.data.conftest import FolderMaker


def test_round_trip(make_folder: FolderMaker, tmp_path: Path) -> None:
    folder = make_folder([[5, 6], [7]])
    manifest = read_manifest(folder)
    again = tmp_path / "again"
    again.mkdir()
    manifest.save(again)
    assert (again / NAME).read_bytes() == (folder / NAME).read_bytes()
    assert manifest.splits["train"].tokens == 5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(make_folder: FolderMaker, share: float) -> None:
    path = make_folder([[5]]) / NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"manifest\.json: is cut short or not a manifest of format 1 .*--force"):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    ("change", "where"), [({"format_version": 2}, "format_version"), ({"dtype": "int8"}, "dtype"), ({"x": 1}, "x")]
)
def test_other_format(make_folder: FolderMaker, change: dict, where: str) -> None:
    path = make_folder([[5]]) / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"not a manifest of format 1 \({where}: "):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("splits", "validation"), r"format 1 \(the file: splits\.validation is missing\)"),
        (("files", "train_000.idx"), r"files\.train_000\.idx is missing"),
        (("files",), "files: Field required"),
    ],
)
def test_what_every_manifest_has(make_folder: FolderMaker, keys: tuple[str, ...], message: str) -> None:
    path = make_folder([[5]]) / NAME
    tree = json.loads(path.read_text())
    section = tree if len(keys) == 1 else tree[keys[0]]
    del section[keys[-1]]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        read_manifest(path.parent)


def test_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            DataError, match=r"is not a prepared data folder \(manifest\.json is missing\): run python -m"
        ):
            read_manifest(folder)


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
