"""token ids -> compressed ids, against `engram_loops` and against what is known of DeepSeek's 129,280 tokens."""

import hashlib
import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.memory.vocabulary import VocabularyMap
from tests.reference import engram_loops as loops
from tests.reference.deepseek_tokens import deepseek_tokens

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "deepseek_vocabulary.json").read_text())

# Each character is one trap: composed and bare accents, marks that space or enclose, case that grows (U+0130) or
# depends on its place (sigma), ligatures, widths, digits, Hangul and Kana that NFD takes apart, every kind of blank,
# controls that Python but not Unicode counts as blank, and the two characters the recipe itself uses.
TRAPS = (
    "aAzZ0éÉñÅåüÜçßẞ\u0301\u0308\u0327\u0903\u20dd\u0130ıΣσςΆΩ\u2126\u212aﬁﬀ²½ªＡａ１①한각ガｶﾞあЁйאبﷺ漢"
    " \t\r\n\v\f\x1c\x1d\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\u200d\ufeff\x00🙂"
)


@pytest.fixture(scope="module")
def deepseek() -> tuple[list[str], list[str]]:
    return deepseek_tokens()


@pytest.fixture(scope="module")
def deepseek_map(deepseek: tuple[list[str], list[str]]) -> VocabularyMap:
    return VocabularyMap.from_texts(*deepseek)


def test_deepseek_tokens_merge_into_99092_classes(deepseek_map: VocabularyMap) -> None:
    assert deepseek_map.table.shape == (129_280,)
    assert deepseek_map.table.dtype == np.int64
    assert deepseek_map.size == 99_092
    assert set(deepseek_map.table.tolist()) == set(range(99_092))


def test_deepseek_map_equals_the_loops_and_the_golden_digest(
    deepseek: tuple[list[str], list[str]], deepseek_map: VocabularyMap
) -> None:
    table, size = loops.vocabulary_map(*deepseek)
    assert deepseek_map.table.tolist() == table
    assert deepseek_map.size == size == GOLDEN["size"]
    assert hashlib.sha256(np.array(table, dtype="<i8").tobytes()).hexdigest() == GOLDEN["sha256"]
    assert {int(token): table[int(token)] for token in GOLDEN["sample"]} == {
        int(token): compressed for token, compressed in GOLDEN["sample"].items()
    }


def test_largest_merge_classes_are_those_of_the_papers_appendix(
    deepseek: tuple[list[str], list[str]], deepseek_map: VocabularyMap
) -> None:
    counts = Counter(deepseek_map.table.tolist())
    token_of = {text: index for index, text in reversed(list(enumerate(deepseek[0])))}
    sizes = {text: counts[int(deepseek_map.table[token_of[text]])] for text in (" ", "a", "o", "e", "i")}
    assert sizes == {" ": 163, "a": 54, "o": 40, "e": 35, "i": 30}
    assert sorted(counts.values(), reverse=True)[:5] == [163, 54, 40, 35, 30]


def test_partial_characters_keep_their_raw_tokens(
    deepseek: tuple[list[str], list[str]], deepseek_map: VocabularyMap
) -> None:
    texts, _ = deepseek
    partial = [index for index, text in enumerate(texts) if "\ufffd" in text]
    assert len(partial) == 1_484
    # Raw tokens are unique, so partial characters never merge with one another.
    assert len({int(deepseek_map.table[index]) for index in partial}) == len(partial)
    # Their texts alone would merge most of them.
    assert len({texts[index] for index in partial}) == 414


def test_compression_is_idempotent(deepseek: tuple[list[str], list[str]], deepseek_map: VocabularyMap) -> None:
    keys = [loops.vocabulary_key(text, raw) for text, raw in zip(*deepseek, strict=True)]
    whole = ["\ufffd" not in text for text in deepseek[0]]
    again = VocabularyMap.from_texts([key if ok else "\ufffd" for key, ok in zip(keys, whole, strict=True)], keys)
    assert np.array_equal(again.table, deepseek_map.table)


def test_classes_are_numbered_as_first_seen() -> None:
    vocabulary = VocabularyMap.from_texts(["the", " The", "cat", "THE\n", "", " Çat", "\t \n", " ", "Cat "])
    assert vocabulary.table.tolist() == [0, 0, 1, 0, 2, 1, 3, 3, 1]
    assert vocabulary.size == 4


def test_raw_tokens_are_used_exactly_where_the_text_is_broken() -> None:
    texts = ["\ufffd", "É", "\ufffd", "x\ufffd", "e", "\ufffd"]
    raw = ["Ã", "unused", "Â", "xÃ", "unused", "E"]
    # The last raw token is a key of its own: raw tokens are never normalised, so "E" is not "e".
    assert VocabularyMap.from_texts(texts, raw).table.tolist() == [0, 1, 2, 3, 1, 4]
    # But it is the same kind of key: a raw token that equals a normalised text joins its class.
    assert VocabularyMap.from_texts(texts, [*raw[:5], "e"]).table.tolist() == [0, 1, 2, 3, 1, 1]


def test_normaliser_traps() -> None:
    pairs = {
        "ﬁ": "fi",
        "\u212b": "A",
        "İ": "i",
        "ΣΑΣ": "σασ",
        "a\u20dd": "a",
        "\u3000": " ",
        "a \t\r\n b": "A B",
        "\x85x\u2028": "x",
        "½": "1\u20442",
        "각": unicodedata.normalize("NFD", "각"),
    }
    for text, same in pairs.items():
        assert VocabularyMap.from_texts([text, same]).table.tolist() == [0, 0], (text, same)
    different = {
        "\x1cx": "x",
        "ı": "i",
        "ς": "σ",
        "\v": " ",
        "a  b": "ab",
        "\u200bx": "x",
        "\u0301": "\u0308",
    }
    for text, other in different.items():
        assert VocabularyMap.from_texts([text, other]).table.tolist() == [0, 1], (text, other)


@given(st.lists(st.text(st.sampled_from(TRAPS + "\ufffd\ue000"), max_size=6), min_size=1, max_size=40))
def test_any_vocabulary_equals_the_loops(texts: list[str]) -> None:
    raw_tokens = [f"<{index % 7}>" for index in range(len(texts))]
    vocabulary = VocabularyMap.from_texts(texts, raw_tokens)
    table, size = loops.vocabulary_map(texts, raw_tokens)
    assert vocabulary.table.tolist() == table
    assert vocabulary.size == size


def test_negative_ids_stay_and_do_not_index_from_the_end() -> None:
    vocabulary = VocabularyMap.from_texts(["a", "b", "A", "c"])
    tokens = torch.tensor([[-1, 0, 3], [2, -7, 1]])
    compressed = vocabulary.compress(tokens)
    assert compressed.dtype == torch.int64
    assert compressed.tolist() == [[-1, 0, 2], [0, -7, 1]]
    assert tokens.tolist() == [[-1, 0, 3], [2, -7, 1]]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(IndexError):
        VocabularyMap.from_texts(["a", "b"]).compress(torch.tensor([2]))


def test_the_table_stands_on_a_device_once() -> None:
    vocabulary = VocabularyMap.from_texts(["a", "b", "A", "c"])
    table = vocabulary.table_on(torch.device("cpu"))
    assert table.tolist() == vocabulary.table.tolist()
    assert vocabulary.table_on(torch.device("cpu")) is table


def test_identity_changes_nothing() -> None:
    vocabulary = VocabularyMap.identity(11)
    assert vocabulary.table.tolist() == list(range(11))
    assert vocabulary.size == 11
    assert vocabulary.compress(torch.arange(11)).tolist() == list(range(11))


def test_digest_names_the_map() -> None:
    base = VocabularyMap.from_texts(["a", "b", "A", "c"])
    assert base.digest == VocabularyMap.from_texts(["x", "y", "X", "z"]).digest
    assert base.digest != VocabularyMap.from_texts(["a", "b", "B", "c"]).digest
    assert base.digest != VocabularyMap.from_texts(["a", "b", "A"]).digest
    assert base.digest != VocabularyMap.identity(4).digest
    assert len(bytes.fromhex(base.digest)) == 32
