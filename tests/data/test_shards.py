import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.data.errors import DataError
from engram.data.manifest import NAME, read_manifest
from engram.data.shards import Dataset, ShardWriter, token_dtype, verify_folder
from tests.data.conftest import FolderMaker

EOS = 2


def documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    return [chance.integers(3, 320, chance.integers(0, longest)).tolist() for _ in range(count)]


def stream(train: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable([*document, EOS] for document in train))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "u2"), (65_536, "u2"), (65_537, "u4")])
def test_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 80),
    vocab_size=st.sampled_from([320, 70_000]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_writer_cuts_between_documents(tmp_path: Path, lengths: list[int], shard_tokens: int, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(tmp_path, "train", dtype, EOS, shard_tokens)
    given_documents = [[vocab_size - 1] * length for length in lengths]
    for document in given_documents:
        assert writer.add(document, b"") == len(document) + 1
    record = writer.close()
    read = []
    for shard in record.shards:
        tokens, starts = np.fromfile(tmp_path / shard.file, dtype), np.load(tmp_path / shard.index)
        assert (len(tokens), len(starts)) == (shard.tokens, shard.documents)
        assert starts[0] == 0 and starts.dtype == np.int64
        assert len(tokens) <= shard_tokens or len(starts) == 1
        read += [part.tolist() for part in np.split(tokens, starts[1:])]
    assert read == [[*document, EOS] for document in given_documents]
    assert (record.tokens, record.documents) == (sum(lengths) + len(lengths), len(lengths))
    # No shard could have taken the first document of the next.
    for shard, following in itertools.pairwise(record.shards):
        first = np.append(np.load(tmp_path / following.index), following.tokens)[1]
        assert shard.tokens + first > shard_tokens


@pytest.mark.parametrize("shard_tokens", [37, 10_000])
def test_dataset_is_one_stream(make_folder: FolderMaker, shard_tokens: int) -> None:
    train = documents(50, 41)
    dataset = Dataset(make_folder(train, shard_tokens=shard_tokens), "train", verify=True, vocab_size=320)
    expected = stream(train)
    assert dataset.num_tokens == len(expected)
    assert (dataset.vocab_size, dataset.eos_id) == (320, EOS)
    starts = [0, *itertools.accumulate(len(document) + 1 for document in train)][:-1]
    assert dataset.documents.tolist() == starts
    for start in range(0, len(expected) - 100, 13):
        window = dataset.window(start, 97)
        assert window.dtype == np.int64
        assert window.tolist() == expected[start : start + 97]
    assert dataset.windows(np.array([5, 0, 300]), 120).tolist() == [expected[s : s + 120] for s in (5, 0, 300)]
    for start in (-1, len(expected) - 4):
        with pytest.raises(IndexError):
            dataset.window(start, 5)


def test_splits_are_apart(make_folder: FolderMaker) -> None:
    folder = make_folder([[5, 6]], validation=[[7], [8, 9]])
    assert Dataset(folder, "validation").window(0, 5).tolist() == [7, EOS, 8, 9, EOS]


def test_missing_file(make_folder: FolderMaker) -> None:
    folder = make_folder([[5]])
    (folder / "train_000.idx").unlink()
    with pytest.raises(DataError, match=r"train_000\.idx: is missing, though the manifest lists it"):
        Dataset(folder, "train")


def test_wrong_size(make_folder: FolderMaker) -> None:
    folder = make_folder([[5]])
    with (folder / "train_000.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"train_000\.bin: has 6 bytes, but the manifest says 4"):
        Dataset(folder, "train")


def test_corruption_is_found_when_asked(make_folder: FolderMaker) -> None:
    folder = make_folder(documents(20, 30))
    path = folder / "train_000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    Dataset(folder, "train")
    with pytest.raises(DataError, match=r"train_000\.bin: its sha256 is .*but the manifest says"):
        Dataset(folder, "train", verify=True)


@pytest.mark.parametrize("data", [bytes(range(136)), b"PK\3\4" + bytes(132), b"\x93NUMPY\1\0" + bytes(128)])
def test_index_that_is_none(make_folder: FolderMaker, data: bytes) -> None:
    folder = make_folder([[5]])
    path = folder / "train_000.idx"
    assert path.stat().st_size == len(data)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train_000\.idx: is not an array of positions .*prepare CONFIG --force"):
        Dataset(folder, "train")


def test_index_of_other_documents(make_folder: FolderMaker) -> None:
    folder = make_folder([[5], [6]])
    with (folder / "train_000.idx").open("wb") as file:
        np.save(file, np.array([0, 2], np.float64))
    with pytest.raises(DataError, match=r"train_000\.idx: holds float64 \[2\], but the shard has 2 documents"):
        Dataset(folder, "train")


def test_counts_that_disagree_with_the_files(make_folder: FolderMaker) -> None:
    path = make_folder([[5, 6]]) / NAME
    path.write_text(path.read_text().replace('"tokens": 3', '"tokens": 30'))
    with pytest.raises(DataError, match=r"train_000\.bin: has 6 bytes, but the manifest's 30 tokens of uint16 are 60:"):
        Dataset(path.parent, "train")


def test_token_outside_of_the_vocabulary(make_folder: FolderMaker) -> None:
    folder = make_folder([[5, 6], [7, 320, 8]])
    with pytest.raises(DataError, match=r"train_000\.bin: token 4 is 320, but ids end at 319"):
        verify_folder(folder)


def test_another_tokenizer(make_folder: FolderMaker) -> None:
    folder = make_folder([[5]])
    path = folder / "tokenizer.model"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokenizer\.model: is not the tokenizer that made the shards"):
        Dataset(folder, "train")


def test_another_vocabulary(make_folder: FolderMaker) -> None:
    with pytest.raises(DataError, match=r"prepared with 320 token ids, but model\.vocab_size is 4,096"):
        Dataset(make_folder([[5]]), "train", vocab_size=4096)


def test_wrong_checksum_of_the_tokenizer_in_the_manifest(make_folder: FolderMaker) -> None:
    folder = make_folder([[5]])
    tree = json.loads((folder / NAME).read_text())
    tree["tokenizer"]["digest"] = "0" * 64
    (folder / NAME).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"is not the tokenizer that made the shards \(sha256 000000000000"):
        verify_folder(folder)


def test_manifest_lists_every_file(make_folder: FolderMaker) -> None:
    folder = make_folder(documents(50, 41), shard_tokens=200)
    assert {path.name for path in folder.iterdir()} == {NAME, *read_manifest(folder).files}
    assert len(read_manifest(folder).splits["train"].shards) > 3
