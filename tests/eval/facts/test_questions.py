"""What questions ask, read back from their prompts; and the certificates, which have to fail when a set leaks."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from engram.config import WorldConfig
from engram.data.world import RELATIONS, World, build_world, documents
from eval.facts.oracles import SOLVES, Copier, Guesser, NgramTable, certify, credit, overlap, words
from eval.facts.questions import KINDS, PER_LEVEL, PER_SET, SETS, Question, ask

# Few entities of all levels, so that the certificates take a moment only.
CONFIG = WorldConfig(seed=1, levels=7, entities_per_level=24, statements_per_level=512, reading_documents=400)
NOUNS = {noun: number for number, (_, noun) in enumerate(RELATIONS)}
VERBS = {verb: number for number, (verb, _) in enumerate(RELATIONS)}
LEAD = r"The \w+ \w+ \w+ the \w+ \w+\."
PERSON = r"([A-Z]\w+ [A-Z]\w+)"


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(CONFIG)


@pytest.fixture(scope="module")
def asked(world: World) -> dict[str, list[Question]]:
    return {name: ask(world, (name,)) for name in SETS}


def facts(world: World) -> dict[tuple[str, int], int]:
    return {
        (world.name(entity.person), relation): town
        for entity in world.entities
        for relation, town in enumerate(entity.towns)
    }


def parsed(question: Question, form: str) -> tuple[str, ...]:
    found = re.fullmatch(form, question.prompt)
    assert found, question.prompt
    return found.groups()


# ----------------------------------------------------------------------------------------------------------- questions


def test_facts_are_asked_with_their_own_answers(world: World, asked: dict[str, list[Question]]) -> None:
    true = facts(world)
    untaught = {world.name(entity.person) for entity in world.entities if not entity.taught}
    for question in asked["local_fact"]:
        name, verb = parsed(question, rf"{LEAD} {PERSON} (\w+)")
        assert question.gold == true[name, VERBS[verb]]
    for question in asked["far_fact"]:
        name, filler, verb = parsed(question, rf"{LEAD} {PERSON}(, as the \w+ \w+ \w+ the \w+,) (\w+)")
        assert question.gold == true[name, VERBS[verb]] and len(words(filler)) >= 6
    for question in asked["paraphrase"]:
        noun, name = parsed(question, rf"{LEAD} The (\w+) of {PERSON} is")
        assert question.gold == true[name, NOUNS[noun]] and name in untaught
    for question in asked["two_hop"]:
        noun, name = parsed(question, rf"{LEAD} The (\w+) of {PERSON} borders")
        assert question.gold == world.borders[true[name, NOUNS[noun]]] and name in untaught
    for question in asked["conflict"]:
        name, verb, told, again = parsed(question, rf"{LEAD} {PERSON} (\w+) (\w+)\. {LEAD} (.*)")
        assert again == f"{name} {verb}" and question.memorised == true[name, VERBS[verb]] != question.gold
        assert world.towns[question.gold] == told


def test_reading_is_asked_with_what_the_prompt_tells(world: World, asked: dict[str, list[Question]]) -> None:
    known = {name for name, _ in facts(world)}
    for question in asked["context_fact"] + asked["niah"]:
        *told, stem = question.prompt.split(". ")
        answers = [line.removeprefix(stem).strip() for line in told if line.startswith(f"{stem} ")]
        assert answers == [world.towns[question.gold]]
    for question in asked["copy"]:
        line, known_part = parsed(question, rf"{LEAD} Say ([\w ]+)\. Say ([\w ]+)")
        assert line.split()[: len(known_part.split())] == known_part.split()
        assert line.split()[len(known_part.split())] == world.towns[question.gold]
    for question in asked["variables"]:
        values: dict[str, str] = {}
        for name, value in re.findall(r"Set (\w+ \w+) to (\w+(?: \w+)?)\.", question.prompt):
            values[name] = values.get(value, value)
        (last,) = re.findall(rf"So {PERSON} is$", question.prompt)
        assert values[last] == world.towns[question.gold] and len(set(values.values())) == 3
    for question in asked["unseen_entity"] + asked["context_fact"] + asked["niah"] + asked["variables"]:
        # Every second word of two capitals may begin a name: none of them is one that training knows.
        capitals = [word if word[0].isupper() else "" for word in words(question.prompt)]
        assert not {f"{a} {b}" for a, b in zip(capitals, capitals[1:], strict=False)} & known


def test_haystacks_are_as_long_as_they_say(asked: dict[str, list[Question]]) -> None:
    for question in asked["niah"]:
        filler = re.findall(LEAD, question.prompt)
        assert question.group == f"{8 * len(filler)} tokens of filler"
        assert len(words(question.prompt)) == 8 * len(filler) + 3 * 9 + 7
        # No two needles stand side by side.
        assert not re.search(r"is \w+\. The secret word of \w+ \w+ is \w+\.", question.prompt)


def test_numbers_ids_and_groups(world: World, asked: dict[str, list[Question]]) -> None:
    assert tuple(KINDS) == SETS
    for name, questions in asked.items():
        assert len({question.id for question in questions}) == len(questions)
        assert all(question.task == name for question in questions)
        assert all(0 <= question.gold < 32 for question in questions)
    levels = Counter(entity.exposures for entity in world.entities)
    counted = Counter(question.group for question in asked["local_fact"])
    assert counted == {f"{level}": min(PER_LEVEL, 4 * count) for level, count in levels.items()}
    assert len(asked["copy"]) == PER_SET


def test_a_question_does_not_depend_on_what_else_is_asked(world: World, asked: dict[str, list[Question]]) -> None:
    assert ask(world, ("niah", "local_fact")) == asked["niah"] + asked["local_fact"]
    assert ask(build_world(CONFIG)) == [question for name in SETS for question in asked[name]]


# -------------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(seed=2), WorldConfig()], ids=["small", "other", "shipped"])
def test_every_set_asks_for_what_it_says(config: WorldConfig) -> None:
    certificates = certify(build_world(config))
    assert {(one.oracle, one.task) for one in certificates} == {(name, task) for name in SOLVES for task in SETS}
    assert [one for one in certificates if not one.holds] == []
    solved = {oracle: {one.task for one in certificates if one.oracle == oracle and one.low > 0.5} for oracle in SOLVES}
    assert solved == {
        "n-gram table": {"local_fact"},
        "copier": {"context_fact", "conflict", "copy", "niah"},
        "guesser": set(),
    }
    # Guessing is at chance from both sides, over all sets together.
    guessed = [one for one in certificates if one.oracle == "guesser"]
    assert sum(one.low <= one.chance <= one.high for one in guessed) >= len(guessed) - 1
    assert np.mean([one.accuracy for one in guessed]) == pytest.approx(1 / 32, abs=0.01)


def test_no_eight_words_of_a_prompt_stand_in_training(world: World) -> None:
    questions, texts = ask(world), list(documents(world))
    assert overlap(questions, texts) == []
    # The check sees what it is for: seven words do stand there, and a planted prompt is found.
    assert len(overlap(questions, texts, 4)) > 500
    planted = questions[100].prompt
    assert overlap(questions, [*texts, f"So {planted} Oken."]) == [planted]
    assert overlap([replace(questions[0], prompt=" ".join(words(planted)[:7]))], [planted]) == []


def test_a_leak_breaks_its_certificate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far facts whose own sentences were in the training text are solved by the n-gram table: the certificate fails."""
    leaked = [f"{question.prompt} {world.towns[question.gold]}." for question in ask(world, ("two_hop",))]
    monkeypatch.setattr("eval.facts.oracles.documents", lambda world: [*documents(world), *leaked])
    broken = [(one.oracle, one.task) for one in certify(world) if not one.holds]
    assert broken == [("n-gram table", "two_hop")]


def test_oracles_by_hand() -> None:
    towns = ("Oken", "Ilat", "Umed")
    table = NgramTable(["a b c Oken. x b c Ilat. y b c Ilat. z Umed, c"], towns)
    scores = {prompt: table.scores(Question("t", "0", prompt, 0)).tolist() for prompt in ("a b c", "q b c", "z", "q")}
    # The longest known key decides, however rare it is.
    assert scores == {"a b c": [1, 0, 0], "q b c": [1, 2, 0], "z": [0, 0, 1], "q": [0, 0, 0]}
    copier = Copier(towns)
    copies = {
        "a b Oken. c b Ilat. a b": [1, 0, 0],
        # Of equally long copies the latest.
        "a b Oken. a b Ilat. a b": [0, 1, 0],
        "a b Oken. c d": [0, 0, 0],
        # What follows is no town.
        "a b c. a b": [0, 0, 0],
    }
    assert {prompt: copier.scores(Question("t", "0", prompt, 0)).tolist() for prompt in copies} == copies
    assert [credit(np.array(scores), 1) for scores in ([0.0, 2, 2], [0.0, 1, 2], [0.0, 0, 0])] == [0.5, 0, 1 / 3]
    question = Question("t", "0", "a", 0)
    assert (Guesser(towns).scores(question) == Guesser(towns).scores(question)).all()
