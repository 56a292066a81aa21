"""The sets of questions about a world: a prompt that a town completes, and which of all towns is right.

| set | what is asked | answered by |
|---|---|---|
| `local_fact` | a learned fact; its key is the last three tokens | an exact table of n-grams |
| `far_fact` | the same facts, nine tokens between name and relation | attention to the name |
| `paraphrase` | the same facts, in a wording that was never stated of this person | facts by name, not by n-gram |
| `two_hop` | what the town of a learned fact borders; never stated of this person | two facts at once |
| `unseen_entity` | a fact of somebody who was never met: no answer exists | nobody |
| `context_fact` | a stranger's fact, given in the prompt beside another stranger's | reading |
| `conflict` | a learned fact that the prompt contradicts; the prompt counts as right | reading over memory |
| `copy` | the next town of a repeated list | induction |
| `niah` | one of three secret words in filler of some length | reading at a distance |
| `variables` | the end of one of three chains of names | following links |

A question depends on its own number alone, whatever others are asked. Names of strangers and the roles of nouns in
filler keep every eight words of a prompt out of the training text (`tests/eval/test_facts_questions.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from random import Random
from typing import Literal

from engram.data.world import World, sentences
from engram.data.world.documents import LISTED, interleaved
from engram.data.world.facts import Entity
from engram.data.world.sentences import Prose

Kind = Literal["knowledge", "reading", "other"]

# What each set asks for: learned facts, text of the prompt, or neither alone.
KINDS: dict[str, Kind] = {
    "local_fact": "knowledge",
    "far_fact": "knowledge",
    "paraphrase": "knowledge",
    "two_hop": "knowledge",
    "unseen_entity": "other",
    "context_fact": "reading",
    "conflict": "reading",
    "copy": "reading",
    "niah": "reading",
    "variables": "reading",
}
SETS = tuple(KINDS)
# What guessing among the towns that a prompt names scores: reading begins above it.
NAMED_CHANCE = {"context_fact": 1 / 2, "niah": 1 / 3, "variables": 1 / 3}
# Facts of one level that are asked, and questions of a set without levels.
PER_LEVEL = 64
PER_SET = 256
# Filler of the needle's haystack, in sentences of eight tokens.
_HAYSTACKS = (4, 8, 16)


@dataclass(frozen=True)
class Question:
    """`gold` and `memorised` (where a set contradicts a learned fact) are places in `World.towns`.

    `id` is equal for the same question to any model; `group`: times that the fact is stated in training, or words.
    """

    task: str
    id: str
    prompt: str
    gold: int
    group: str = ""
    memorised: int | None = None


def ask(world: World, sets: tuple[str, ...] = SETS) -> list[Question]:
    """All questions of the sets, in order."""
    return [question for name in sets for question in _MAKERS[name](world)]


def _local(world: World) -> Iterator[Question]:
    for key, entity, relation, _, lead in _facts(world, "local_fact"):
        stem = sentences.local(world.name(entity.person), relation)
        yield _of_fact("local_fact", key, f"{lead} {stem}", entity, entity.towns[relation])


def _far(world: World) -> Iterator[Question]:
    for key, entity, relation, prose, lead in _facts(world, "far_fact"):
        stem = sentences.far(world.name(entity.person), relation, prose)
        yield _of_fact("far_fact", key, f"{lead} {stem}", entity, entity.towns[relation])


def _paraphrase(world: World) -> Iterator[Question]:
    for key, entity, relation, _, lead in _facts(world, "paraphrase", untaught=True):
        stem = sentences.paraphrase(world.name(entity.person), relation)
        yield _of_fact("paraphrase", key, f"{lead} {stem}", entity, entity.towns[relation])


def _two_hop(world: World) -> Iterator[Question]:
    for key, entity, relation, _, lead in _facts(world, "two_hop", untaught=True):
        stem = sentences.two_hop(world.name(entity.person), relation)
        yield _of_fact("two_hop", key, f"{lead} {stem}", entity, world.borders[entity.towns[relation]])


def _conflict(world: World) -> Iterator[Question]:
    for key, entity, relation, prose, lead in _facts(world, "conflict"):
        stem, true = sentences.local(world.name(entity.person), relation), entity.towns[relation]
        other = prose.random.choice([town for town in range(len(world.towns)) if town != true])
        prompt = f"{lead} {stem} {world.towns[other]}. {prose.sentence()} {stem}"
        yield Question("conflict", key, prompt, other, str(entity.exposures), memorised=true)


def _unseen(world: World) -> Iterator[Question]:
    for key, random, prose in _numbered(world, "unseen_entity"):
        stem = sentences.local(world.name(world.stranger(random)), random.randrange(world.config.relations))
        yield Question("unseen_entity", key, f"{prose.sentence()} {stem}", random.randrange(len(world.towns)))


def _context(world: World) -> Iterator[Question]:
    for key, random, prose in _numbered(world, "context_fact"):
        relation = random.randrange(world.config.relations)
        stems = [sentences.local(name, relation) for name in _strangers(world, 2, random)]
        golds = random.sample(range(len(world.towns)), 2)
        told = [
            text
            for stem, gold in zip(stems, golds, strict=True)
            for text in (f"{stem} {world.towns[gold]}.", prose.sentence())
        ]
        which = random.randrange(2)
        yield Question("context_fact", key, " ".join([prose.sentence(), *told, stems[which]]), golds[which])


def _copy(world: World) -> Iterator[Question]:
    for key, random, prose in _numbered(world, "copy"):
        places = random.sample(range(len(world.towns)), LISTED)
        names, known = [world.towns[place] for place in places], random.randrange(1, LISTED)
        prompt = f"{prose.sentence()} {sentences.listed(names)}. {sentences.listed(names[:known])}"
        yield Question("copy", key, prompt, places[known])


def _niah(world: World) -> Iterator[Question]:
    for key, random, prose in _numbered(world, "niah"):
        stems = [sentences.needle(name) for name in _strangers(world, 3, random)]
        golds = random.sample(range(len(world.towns)), 3)
        length, which = random.choice(_HAYSTACKS), random.randrange(3)
        needles = [f"{stem} {world.towns[gold]}." for stem, gold in zip(stems, golds, strict=True)]
        # Filler stands before the first, behind the last, and between any two needles.
        places = sorted(random.sample(range(1, length), 3))
        parts = zip([0, *places], [*places, length], strict=True)
        hay = [" ".join(prose.sentences(end - start)) for start, end in parts]
        lines = [text for part, line in zip(hay, [*needles, stems[which]], strict=True) for text in (part, line)]
        yield Question("niah", key, " ".join(lines), golds[which], f"{8 * length} tokens of filler")


def _variables(world: World) -> Iterator[Question]:
    for key, random, prose in _numbered(world, "variables"):
        length = random.randint(2, 3)
        names = _strangers(world, 3 * length, random)
        chains = [names[start : start + length] for start in range(0, len(names), length)]
        golds, which = random.sample(range(len(world.towns)), 3), random.randrange(3)
        links = [sentences.links(chain, world.towns[gold]) for chain, gold in zip(chains, golds, strict=True)]
        lines = [prose.sentence(), *interleaved(links, random), sentences.end_of_chain(chains[which][-1])]
        yield Question("variables", key, " ".join(lines), golds[which], f"{length} links")


_MAKERS: dict[str, Callable[[World], Iterator[Question]]] = {
    "local_fact": _local,
    "far_fact": _far,
    "paraphrase": _paraphrase,
    "two_hop": _two_hop,
    "unseen_entity": _unseen,
    "context_fact": _context,
    "conflict": _conflict,
    "copy": _copy,
    "niah": _niah,
    "variables": _variables,
}


def _facts(world: World, task: str, untaught: bool = False) -> Iterator[tuple[str, Entity, int, Prose, str]]:
    """Up to PER_LEVEL facts of each level: id, entity, relation, filler to ask with, and a sentence to begin with."""
    asked = (entity for entity in world.entities if not (untaught and entity.taught))
    for level, entities in groupby(asked, key=lambda entity: entity.exposures):
        facts = [(entity, relation) for entity in entities for relation in range(world.config.relations)]
        chosen = Random(f"{task} {world.config.seed} {level}").sample(facts, min(PER_LEVEL, len(facts)))
        for entity, relation in chosen:
            key = f"{world.name(entity.person)}, {sentences.local('', relation).strip()}"
            prose = Prose(Random(f"{task} {world.config.seed} {key}"), asking=True)
            yield key, entity, relation, prose, prose.sentence()


def _of_fact(task: str, key: str, prompt: str, entity: Entity, gold: int) -> Question:
    return Question(task, key, prompt, gold, str(entity.exposures))


def _numbered(world: World, task: str) -> Iterator[tuple[str, Random, Prose]]:
    for number in range(PER_SET):
        random = Random(f"{task} {world.config.seed} {number}")
        yield str(number), random, Prose(random, asking=True)


def _strangers(world: World, count: int, random: Random) -> list[str]:
    """Names of different strangers."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[world.name(world.stranger(random))] = None
    return list(names)
