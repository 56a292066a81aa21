"""Named entities: the file's format, names by their capitals, and the token at which each ends."""

from pathlib import Path

import pytest

from engram.config import UserError
from engram.data.shards import Dataset
from engram.data.tokenizer import Tokenizer, load_tokenizer
from eval.documents import read_documents
from eval.entities import Passage, entity_positions, last_token, names_in, passages_of, read_few_nerd


@pytest.fixture(scope="module")
def tokenizer(prepared_folder: Path) -> Tokenizer:
    """SentencePiece with byte pieces for characters that its corpus did not have."""
    return load_tokenizer(prepared_folder)


def few_nerd(folder: Path, text: str) -> Path:
    path = folder / "entities.txt"
    path.write_bytes(text.encode())
    return path


def found(passage: Passage) -> list[str]:
    return [passage.text[start:end] for start, end in passage.spans]


def test_few_nerd_sentences(tmp_path: Path) -> None:
    lines = [
        "The\tO",
        "Łódź\tlocation-GPE",
        "Film\tart-film",
        "School\tart-film",
        "opened\tO",
        # Neighbours of one label are one entity: the format does not say where one begins.
        "Anna\tperson-actor",
        "Bella\tperson-actor",
        "",
        "",
        "東京\tlocation-GPE",
        ".\tO",
    ]
    passages = read_few_nerd(few_nerd(tmp_path, "\n".join(lines)))
    assert [passage.text for passage in passages] == ["The Łódź Film School opened Anna Bella", "東京 ."]
    assert [found(passage) for passage in passages] == [["Łódź", "Film School", "Anna Bella"], ["東京"]]
    # Windows' line ends, and labels that go on into the next sentence, which are entities of their own.
    passages = read_few_nerd(few_nerd(tmp_path, "Paris\tplace\r\n\r\nRome\tplace\r\n"))
    assert [found(passage) for passage in passages] == [["Paris"], ["Rome"]]


@pytest.mark.parametrize("line", ["Rome place", "Rome\tplace\tmore", "\tplace", "Rome\t"])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"entities.txt, line 4: .* is not `word <tab> label`"):
        read_few_nerd(few_nerd(tmp_path, f"Paris\tplace\nis\tO\n\n{line}\n"))


def test_files_without_entities(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no entity"):
        read_few_nerd(few_nerd(tmp_path, "is\tO\nhere\tO\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_few_nerd(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("Zürich\tplace\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read.*UTF-8"):
        read_few_nerd(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Today the United States of America and Żora met.", ["United States", "America", "Żora"]),
        ("He left. Paris was far, Rome near", ["Rome"]),
        ("a title: Paris\nRome is here", []),
        ('she said "Paris" and (Rome) to Jean-Luc Picard’s crew', ["Jean-Luc Picard"]),
        ("then I saw what I'd seen of X and A4 in NATO", ["A4", "NATO"]),
        ("in the Paris  Metro of old", ["Paris"]),
        ("Москва and then Москва, or 東京", ["Москва"]),
    ],
)
def test_names_by_their_capitals(text: str, names: list[str]) -> None:
    assert [text[start:end] for start, end in names_in(text)] == names


def test_the_last_token_completes_the_entity(tokenizer: Tokenizer) -> None:
    """Against the pieces of every prefix, also where characters are several byte pieces."""
    text = "the people of Zürich, 東京 and Commonwealth"
    ids = tokenizer.encode(text)
    assert sum(piece.startswith("<0x") for piece in map(tokenizer.raw_tokens().__getitem__, ids)) >= 6
    for word in ("people", "Zürich", "東京", "東", "Commonwealth"):
        end = text.index(word) + len(word)
        position = last_token(tokenizer, ids, text[:end])
        assert position is not None
        assert tokenizer.decode(ids[: position + 1]).startswith(text[:end])
        assert not tokenizer.decode(ids[:position]).startswith(text[:end])
    # Cut inside of a character, and text that these tokens do not begin with.
    assert last_token(tokenizer, ids[: last_token(tokenizer, ids, "the people of Z")], "the people of Zü") is None
    assert last_token(tokenizer, ids, "the peoples of Z") is None


def test_one_mention_of_every_entity(tokenizer: Tokenizer) -> None:
    def passage(text: str) -> Passage:
        return Passage(text, names_in(text))

    texts = ["we met Anna and Bella", "nothing here", "so Anna met Emma and Bella in Rome", "far too long for Corsica"]
    passages = [passage(text) for text in texts]
    length = len(tokenizer.encode(texts[2]))
    entities = entity_positions(passages, tokenizer, length)
    names = [mention.entity for mention in entities.chosen]
    assert names == ["Anna", "Bella", "Emma", "Rome"] + ["Corsica"] * (len(names) == 5)
    assert (entities.mentions, entities.unique) == (7, 5) and entities.unaligned == 5 - len(names)
    assert entities.positions.rows[:2] == [tokenizer.encode(texts[0]), tokenizer.encode(texts[2])]
    assert entities.positions.row_N.tolist()[:4] == [0, 0, 1, 1]
    for mention in entities.chosen:
        row = entities.positions.rows[mention.row]
        assert row[mention.position] == mention.token
        assert tokenizer.decode(row[: mention.position + 1]).endswith(mention.entity)
    assert entities.positions.units == len(names) == entities.counts["used"]

    limited = entity_positions(passages, tokenizer, length, 3)
    assert [mention.entity for mention in limited.chosen] == names[:3] and limited.mentions == 7
    endings = entity_positions(passages, tokenizer, length, distinct_last_token=True)
    assert [mention.entity for mention in endings.chosen][:2] == ["Anna", "Rome"]
    assert endings.counts["distinct_last_tokens"] == len(endings.chosen) < len(names)


def test_entities_beyond_the_length_are_counted(tokenizer: Tokenizer) -> None:
    passages = [Passage(text, names_in(text)) for text in ("we met Anna", "we met people of union in Rome")]
    length = len(tokenizer.encode("we met Anna"))
    entities = entity_positions(passages, tokenizer, length)
    assert [mention.entity for mention in entities.chosen] == ["Anna"] and entities.unaligned == 1
    with pytest.raises(UserError, match="no entity found in the first 1 tokens"):
        entity_positions(passages, tokenizer, 1)


def test_documents_keep_their_own_tokens(prepared_folder: Path, tokenizer: Tokenizer) -> None:
    documents = read_documents(Dataset(prepared_folder, "validation"), 32)
    passages = list(passages_of(documents, tokenizer))
    assert [passage.ids for passage in passages] == documents
    assert [passage.text for passage in passages] == [tokenizer.decode(document) for document in documents]
