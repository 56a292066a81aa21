"""RULER's tasks: every sample fits, holds its answer once, and can be solved by reading it."""

import json
from pathlib import Path

import pytest

from engram.config import UserError
from eval.ruler.extraction import frequencies
from eval.ruler.haystacks import read_essay
from eval.ruler.questions import read_hotpot, read_squad
from eval.ruler.sample import Sample, sample
from eval.ruler.string_match import string_match
from eval.ruler.tasks import GROUPS, Sources, all_tasks, choose
from eval.ruler.words import adjectives, nouns
from tests.eval.pieces import Pieces, solve

LENGTHS = {"tiny": (300, 900), "full": (1500, 5000)}
CASES = [(profile, name) for profile in LENGTHS for name in all_tasks("tiny", Sources())]


def draw(profile: str, name: str, length: int, index: int = 0, seed: int = 0, sources: Sources | None = None) -> Sample:
    task = all_tasks(profile, sources or Sources())[name]
    return sample(task, Pieces(), length, seed, index)


@pytest.mark.parametrize(("profile", "name"), CASES)
def test_samples_fill_their_length_and_can_be_solved(profile: str, name: str) -> None:
    for length in LENGTHS[profile]:
        for index in range(3):
            one = draw(profile, name, length, index)
            assert one.length == len(Pieces().encode(one.input + one.answer_prefix)) + one.new_tokens
            assert 0.85 * length < one.length <= length
            assert one.new_tokens >= len(Pieces().encode(" " + one.answer))
            assert all(output in one.input for output in one.outputs)
            assert len(set(one.outputs)) == len(one.outputs)
            found = solve(one)
            assert sorted(found) == sorted(one.outputs), one.input
            # What a perfect reader writes scores 1, and an empty answer 0.
            assert string_match(one.answer, one.outputs, one.match) == 1
            assert string_match("", one.outputs, one.match) == 0


@pytest.mark.parametrize(("profile", "name"), [case for case in CASES if "niah" in case[1] or "qa" in case[1]])
def test_the_answer_stands_once_and_where_the_depth_says(profile: str, name: str) -> None:
    one, pieces = draw(profile, name, LENGTHS[profile][0]), Pieces()
    total = len(pieces.encode(one.prompt))
    for output in one.outputs:
        assert one.input.count(output) == 1
    assert one.token_position_answer == round(min(one.needle_depths) * total)
    for depth, output in zip(one.needle_depths, one.outputs if "niah" in name else [one.outputs[0]], strict=False):
        if name == "qa_2":
            continue
        before = len(pieces.encode(one.input[: one.input.index(output)]))
        # The needle begins a few words before its value.
        assert 0 < before - depth * total < 60


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
        ("niah_single_3", 1, 1, 1),
    ],
)
def test_needles_are_as_many_as_nvidia_s(name: str, keys: int, values: int, queries: int) -> None:
    one = draw("full", name, 1500)
    told = one.input.split("One of the special magic ")[1:]
    assert len(told) == keys * values and len(one.outputs) == queries * values
    assert len({line.split(" for ")[1].split(" is:")[0] for line in told}) == keys
    assert ("What are all" in one.input) == (queries * values > 1)
    assert one.answer_prefix.endswith(" are" if queries * values > 1 else " is")
    kind = "uuid" if name == "niah_single_3" else "number"
    assert f"special magic {kind}{'s' if queries * values > 1 else ''} for" in one.answer_prefix


def test_a_sample_depends_on_its_own_index_alone() -> None:
    task, pieces = all_tasks("tiny", Sources())["niah_multikey_2"], Pieces()
    many = [sample(task, pieces, 400, 7, index) for index in range(12)]
    assert sample(task, Pieces(), 400, 7, 11) == many[11]
    assert len({one.id for one in many}) == len({one.input for one in many}) == 12
    assert sample(task, pieces, 400, 8, 11).input != many[11].input
    assert sample(task, pieces, 500, 7, 11).outputs != many[11].outputs


def test_needles_change_places_from_sample_to_sample() -> None:
    """NVIDIA shuffles needles by a constant: the one that is asked for then stands always at the same rank."""
    depths, ranks = [], set()
    for index in range(80):
        one = draw("tiny", "niah_single_2", 600, index)
        depths.append(one.needle_depths[0])
        many = draw("tiny", "niah_multiquery", 600, index)
        ranks.add(tuple(sorted(range(2), key=lambda place, many=many: many.needle_depths[place])))
    bins = [sum(low <= depth < low + 0.2 for depth in depths) for low in (0, 0.2, 0.4, 0.6, 0.8)]
    assert min(bins[:4]) >= 6 and len(ranks) == 2


def test_even_the_smallest_sample_may_be_too_long() -> None:
    with pytest.raises(UserError, match=r"vt: its smallest sample 0 takes [\d,]+ tokens, but the length is 200: raise"):
        draw("full", "vt", 200)


def test_frequent_words_follow_the_zeta_law() -> None:
    # zeta(2) = pi^2 / 6.
    assert frequencies(1000, 4) == [int(1000 / (k * k) / 1.6449340668482264) for k in (1, 2, 3, 4)]


def test_words_suffice_and_differ() -> None:
    assert len(adjectives()) >= 200 and len(nouns()) >= 200
    assert len({*adjectives(), *nouns()}) == len(adjectives()) + len(nouns())


def test_long_lists_get_more_words_than_there_are() -> None:
    one = draw("full", "cwe", 40_000)
    assert one.length > 39_000 and sorted(solve(one)) == sorted(one.outputs)


def test_an_essay_hides_the_needles(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f"Sentence of {word} ends here." for word in nouns()[:30]))
    sources = Sources(essay=read_essay(path))
    one = draw("tiny", "niah_single_2", 600, sources=sources)
    assert one.haystack == "essay" and draw("tiny", "niah_single_2", 600).haystack == "synthetic"
    context = one.input.split("\nWhat")[0]
    rest = [part for part in context.split(".") if "Sentence of" not in part and "magic" not in part]
    assert all(not part.strip() for part in rest)
    assert draw("tiny", "niah_single_2", 600, 1, sources=sources).input.split(".")[0] != one.input.split(".")[0]
    path.write_text("Too short.")
    with pytest.raises(UserError, match="has 1 sentences, but a haystack needs at least 10"):
        read_essay(path)


def test_questions_from_files(tmp_path: Path) -> None:
    def paragraph(name: str, asked: list[dict]) -> dict:
        return {"context": f"{name} is the capital of {name}land. It is old.", "qas": asked}

    good = {"question": "Which town?", "answers": [{"text": "Ava"}, {"text": "Ava"}, {"text": "the Ava"}]}
    wrong = {"question": "Never?", "answers": [], "is_impossible": True}
    article = {"paragraphs": [paragraph("Ava", [good, wrong]), paragraph("Bex", [])]}
    others = [{"paragraphs": [paragraph(f"Town{i}", [])]} for i in range(40)]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [article, *others]}))
    one = draw("full", "qa_1", 400, sources=Sources(squad=read_squad(squad)))
    assert one.outputs == ("Ava", "the Ava") and one.match == "part" and one.haystack == "documents"
    # The answer's own document, and its article's others before any.
    assert "Ava is the capital" in one.input and "Bex is the capital" in one.input
    assert one.input.index("Document 1:") < one.input.index("Document 2:") and one.length <= 400
    with pytest.raises(UserError, match="sample 1 is asked for, but the file has 1 questions: lower --samples"):
        draw("full", "qa_1", 400, index=1, sources=Sources(squad=read_squad(squad)))

    hotpot = tmp_path / "hotpot.json"
    documents = [["Ava", ["Ava is ", "old."]], ["Bex", ["Bex is new."]]]
    hotpot.write_text(json.dumps([{"question": "Which is old?", "answer": "Ava", "context": documents}]))
    two = draw("full", "qa_2", 400, sources=Sources(hotpot=read_hotpot(hotpot)))
    assert "Ava\nAva is old." in two.input and "Bex\nBex is new." in two.input and two.outputs == ("Ava",)
    for read, path in ((read_squad, hotpot), (read_hotpot, squad)):
        with pytest.raises(UserError, match="JSON"):
            read(path)


def test_tasks_are_chosen_by_name_or_group() -> None:
    tasks = all_tasks("full", Sources())
    assert len(tasks) == 13 and {task.group for task in tasks.values()} == set(GROUPS)
    assert list(choose(tasks, ("QA", "vt"))) == ["vt", "qa_1", "qa_2"]
    with pytest.raises(UserError, match="no task 'niah_singl_1': did you mean 'niah_single_1'"):
        choose(tasks, ("niah_singl_1",))
