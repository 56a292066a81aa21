import numpy as np
import pytest

from engram.data.errors import DataError
from engram.data.tokenizer_training import excerpts, train_tokenizer
from tests.data.conftest import sentences


def test_same_text_same_file() -> None:
    texts = sentences(150)
    first, second = (train_tokenizer(texts, 310, 0.9999) for _ in range(2))
    assert first.digest == second.digest
    assert train_tokenizer(texts[:50], 310, 0.9999).digest != first.digest


def test_merges_respect_words_and_learn_white_space() -> None:
    code = ["def f(x):\n    if x:\n        return x\n    return f(x)\n\n\n"] * 50 + sentences(100)
    tokenizer = train_tokenizer(code, 340, 1.0)
    pieces = tokenizer.raw_tokens()
    assert any(set(piece) == {"\u2581"} and len(piece) > 1 for piece in pieces)
    assert not any("\u2581" in piece[1:] and piece.strip("\u2581") for piece in pieces)
    assert len(tokenizer.encode(" " * 8)) <= 2


def test_all_text_is_shown_where_it_is_little() -> None:
    texts = ["ab\tcd", "x" * 5000, "\u2581y\u2585z\0"]
    shown = list(excerpts(texts, sum(map(len, texts)), 10_000))
    assert "".join(shown) == "abcd" + "x" * 5000 + "yz"
    assert max(map(len, shown)) == 2048


@pytest.mark.parametrize("wanted", [20_000, 50_000, 123_456])
def test_excerpts_are_spread_evenly(wanted: int) -> None:
    # Text i is made of the character i, so that an excerpt tells where it comes from.
    texts = [chr(0x4E00 + number) * 10_240 for number in range(100)]
    shown = list(excerpts(texts, 1_024_000, wanted))
    assert abs(sum(map(len, shown)) - wanted) <= 2048
    origins = np.array([ord(excerpt[0]) - 0x4E00 for excerpt in shown])
    gaps = np.diff(origins)
    assert gaps.max() - gaps.min() <= 1
    assert origins[0] <= gaps.max() and 99 - origins[-1] <= gaps.max()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["union"], 259, r"model\.vocab_size is 259, but 259 ids go to the 256 bytes"),
        (["union"], 4096, r"supports at most \d+ pieces, but model\.vocab_size is 4,096: add text or lower"),
        (
            ["".join(map(chr, range(0x4E00, 0x4E40)))],
            270,
            r"is 270, but the bytes and characters .* alone take 323 ids",
        ),
    ],
)
def test_sizes_that_cannot_be(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(texts, vocab_size, 1.0)


def test_errors_of_the_texts_stay_what_they_are() -> None:
    def interrupted():
        yield "union"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(interrupted(), 300, 1.0)
