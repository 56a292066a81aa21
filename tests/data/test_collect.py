import hashlib
from pathlib import Path

import pytest

from engram.data.collect import Collection
from engram.data.corpora import Source
from engram.data.documents import Document, keyed_fraction, text_digest
from engram.data.errors import DataError
from engram.data.progress import Progress
from tests.data.conftest import sentences


def source(*texts: str, name: str = "mine") -> Source:
    documents = [Document(text, {"origin": f"place {number}"}) for number, text in enumerate(texts)]
    return Source(name, "free", "here", lambda: iter(documents))


def collection(tmp_path: Path, fraction: float = 0.2, seed: int = 0) -> Collection:
    return Collection(tmp_path / "spool", seed, fraction)


def kept(collection: Collection) -> tuple[list[str], list[str]]:
    return list(collection.texts(collection.train)), list(collection.texts(collection.validation))


def test_every_document_once_in_the_order_of_its_key(tmp_path: Path) -> None:
    texts = [*sentences(300), "caf\u00e9 \U0001f389\n"]
    gathered = collection(tmp_path)
    gathered.add(source(*texts[:150]), 1.0, Progress())
    gathered.add(source(*texts[150:], name="other"), 1.0, Progress())
    gathered.close()
    keys = {text: keyed_fraction("split 0", text_digest(text)) for text in texts}
    ordered = sorted(texts, key=keys.__getitem__)
    train, validation = kept(gathered)
    assert validation + train == ordered
    assert [text for text in ordered if keys[text] < 0.2] == validation
    assert 30 < len(validation) < 90
    for number in gathered.order:
        (text,) = gathered.texts([number])
        assert gathered.digest(number) == text_digest(text)
        assert gathered.source(number) == int(text not in texts[:150])
    assert gathered.characters(gathered.train) == sum(map(len, train))


def test_split_does_not_depend_on_the_order_of_reading(tmp_path: Path) -> None:
    texts = sentences(100)
    splits = []
    for arrangement in (texts, texts[::-1]):
        gathered = collection(tmp_path)
        gathered.add(source(*arrangement), 1.0, Progress())
        gathered.close()
        splits.append(kept(gathered))
    assert splits[0] == splits[1]


def test_seeds_split_differently(tmp_path: Path) -> None:
    splits = []
    for seed in (0, 1):
        gathered = collection(tmp_path, seed=seed)
        gathered.add(source(*sentences(100)), 1.0, Progress())
        gathered.close()
        splits.append(set(kept(gathered)[1]))
    assert splits[0] != splits[1]


def test_record(tmp_path: Path) -> None:
    gathered = collection(tmp_path)
    texts = ("é b", "é  b\n", " \n", "", "c", "c")
    gathered.add(source(*texts), 1.0, Progress())
    record = gathered.records[0]
    assert (record.documents_read, record.empty, record.duplicates, record.documents) == (6, 2, 2, 2)
    assert (record.characters, record.bytes, record.left_out) == (4, 5, 0)
    assert record.digest == hashlib.sha256(text_digest("é b") + text_digest("c")).hexdigest()


def test_duplicates_of_an_earlier_source_go(tmp_path: Path) -> None:
    gathered = collection(tmp_path)
    gathered.add(source("a", "b"), 1.0, Progress())
    gathered.add(source("b", "c", name="second"), 1.0, Progress())
    assert [(record.documents, record.duplicates) for record in gathered.records] == [(2, 0), (1, 1)]


def test_fraction_keeps_its_share_and_grows(tmp_path: Path) -> None:
    texts = sentences(1000)
    shares = []
    for fraction in (0.1, 0.5):
        gathered = collection(tmp_path)
        gathered.add(source(*texts), fraction, Progress())
        gathered.close()
        shares.append(set().union(*kept(gathered)))
        assert gathered.records[0].left_out == 1000 - len(shares[-1])
    assert shares[0] < shares[1]
    assert abs(len(shares[0]) - 100) < 40 and abs(len(shares[1]) - 500) < 70


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), r"source 'mine': none of its 0 documents can be used \(0 empty, 0 duplicates, 0 left out"),
        (("", " \n"), r"none of its 2 documents can be used \(2 empty, 0 duplicates"),
        (("known", "known "), r"none of its 2 documents can be used \(0 empty, 2 duplicates"),
    ],
)
def test_source_without_usable_documents(tmp_path: Path, texts: tuple[str, ...], message: str) -> None:
    gathered = collection(tmp_path)
    gathered.add(source("known", name="first"), 1.0, Progress())
    with pytest.raises(DataError, match=message):
        gathered.add(source(*texts), 1.0, Progress())


def test_fraction_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 left out by its fraction 1e-09"):
        collection(tmp_path).add(source("a", "b", "c"), 1e-9, Progress())


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_empty_split(tmp_path: Path, fraction: float, split: str) -> None:
    gathered = collection(tmp_path, fraction)
    gathered.add(source("a", "b"), 1.0, Progress())
    with pytest.raises(DataError, match=rf"the {split} split is empty: .*validation_fraction .* all 2 documents"):
        gathered.close()


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="place 1: character 2 is half of a surrogate pair"):
        collection(tmp_path).add(source("a", "ab\ud800"), 1.0, Progress())
