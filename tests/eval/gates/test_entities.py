"""Which tokens of a document are marked as names, through a trained SentencePiece model."""

from pathlib import Path

import pytest

from engram.data.tokenizer import Tokenizer
from eval.gates.entities import mark_names
from eval.loading import load


@pytest.fixture(scope="module")
def tokenizer(run_folder: Path) -> Tokenizer:
    return load(run_folder, device="cpu").tokenizer


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("the people of Union States shall meet Ada Lovelace, then Byron", ["Union States", "Ada Lovelace", "Byron"]),
        ("we saw the café of Überlingen and of José Noël.", ["Überlingen", "José Noël"]),
        ("the common people. Congress shall have power", []),
        ("Rome", []),
    ],
)
def test_marked_tokens_spell_the_names(tokenizer: Tokenizer, text: str, names: list[str]) -> None:
    ids = tokenizer.encode(text)
    found = mark_names([ids], tokenizer)
    # Each run of inner tokens ends in a final token; what stands between the ends is one name with its pieces.
    spelled, start = [], None
    for t, (inside, final) in enumerate(zip(found.inside_N.tolist(), found.final_N.tolist(), strict=True)):
        assert inside or not final
        start = t if inside and start is None else start
        if final:
            spelled.append(tokenizer.decode(ids[: t + 1]).removeprefix(tokenizer.decode(ids[:start])))
            start = None
        assert inside or start is None
    # Tokens of this small vocabulary are pieces of words, so that marks are whole names but for a space before them.
    assert [piece.strip(" ") for piece in spelled] == names


def test_documents_stand_one_after_another(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("in Rome"), tokenizer.encode("Rome shall meet Oslo now")
    together = mark_names([first, second, first], tokenizer)
    alone = [mark_names([document], tokenizer) for document in (first, second, first)]
    assert together.final_N.tolist() == sum((one.final_N.tolist() for one in alone), [])
    assert together.inside_N.tolist() == sum((one.inside_N.tolist() for one in alone), [])
    assert together.final_N.sum() == 3


def test_a_name_that_the_cut_leaves_incomplete_is_none(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("we saw Constantinople")
    assert mark_names([ids], tokenizer).final_N.nonzero()[0].tolist() == [len(ids) - 1]
    cut = mark_names([ids[:-1]], tokenizer)
    # What is left of it is still a capitalised word, which ends where the document does.
    assert cut.final_N.nonzero()[0].tolist() == [len(ids) - 2]
