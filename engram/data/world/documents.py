"""The training documents of a world: facts as often as their levels say, and texts that teach to read.

Every document begins with a sentence of filler, so that names and towns always follow a space.
"""

from collections.abc import Iterator
from random import Random

from engram.data.world import sentences
from engram.data.world.facts import Entity, World
from engram.data.world.sentences import Prose

_FACTS_PER_DOCUMENT = 8
# A sentence of filler before one of so many facts, and how often each border is stated.
_FACTS_PER_FILLER = 4
_BORDERS = 128
# Towns of a list, and how often a text that teaches to read tells the same.
LISTED = 8
_TELLINGS = 4


def documents(world: World) -> Iterator[str]:
    """All of them, in an order that does not matter; the validation split takes its share of each kind."""
    random = Random(f"documents {world.config.seed}")
    prose = Prose(random)
    stated = [text for entity in world.entities for text in _statements(world, entity, prose)]
    stated += [
        f"{sentences.border(town)} {world.towns[world.borders[number]]}."
        for number, town in enumerate(world.towns)
        for _ in range(min(_BORDERS, world.config.statements_per_level))
    ]
    random.shuffle(stated)
    for start in range(0, len(stated), _FACTS_PER_DOCUMENT):
        lines = [prose.sentence()]
        for text in stated[start : start + _FACTS_PER_DOCUMENT]:
            if random.randrange(_FACTS_PER_FILLER) == 0:
                lines.append(prose.sentence())
            lines.append(text)
        yield " ".join(lines)
    kinds = (_reading, _needles, _chains, _list)
    for number in range(world.config.reading_documents):
        yield " ".join(kinds[number % len(kinds)](world, random, prose))


def _statements(world: World, entity: Entity, prose: Prose) -> Iterator[str]:
    """Each fact `exposures` times, in turn locally, far and (taught entities) paraphrased; two hops are no exposure."""
    name, forms = world.name(entity.person), 3 if entity.taught else 2
    for relation, town in enumerate(entity.towns):
        for number in range(entity.exposures):
            if number % forms == 0:
                stem = sentences.local(name, relation)
            elif number % forms == 1:
                stem = sentences.far(name, relation, prose)
            else:
                stem = sentences.paraphrase(name, relation)
            yield f"{stem} {world.towns[town]}."
        if entity.taught:
            neighbour = world.towns[world.borders[town]]
            yield from [f"{sentences.two_hop(name, relation)} {neighbour}."] * (entity.exposures // 4)


def _reading(world: World, random: Random, prose: Prose) -> list[str]:
    """Four passers-by, one relation of each, told some times over in changing order."""
    stems = [sentences.local(name, random.randrange(world.config.relations)) for name in _passers_by(world, 4, random)]
    lines = [f"{stem} {random.choice(world.towns)}." for stem in stems]
    return [text for _ in range(_TELLINGS) for text in (prose.sentence(), *random.sample(lines, len(lines)))]


def _needles(world: World, random: Random, prose: Prose) -> list[str]:
    """Some secret words among filler, and all of them again at the end."""
    stems = [sentences.needle(name) for name in _passers_by(world, 3, random)]
    lines = [f"{stem} {random.choice(world.towns)}." for stem in stems]
    hay = [text for line in lines for text in (line, *prose.sentences(random.randrange(1, 5)))]
    return [*prose.sentences(random.randrange(1, 5)), *hay, *random.sample(lines, len(lines))]


def _chains(world: World, random: Random, prose: Prose) -> list[str]:
    """Two chains of one to three links, mixed, and the end of each."""
    lengths, towns = [random.randint(1, 3) for _ in range(2)], random.sample(world.towns, 2)
    names = _passers_by(world, sum(lengths), random)
    chains = [names[: lengths[0]], names[lengths[0] :]]
    return [
        prose.sentence(),
        *interleaved([sentences.links(names, town) for names, town in zip(chains, towns, strict=True)], random),
        *(f"{sentences.end_of_chain(names[-1])} {town}." for names, town in zip(chains, towns, strict=True)),
    ]


def _list(world: World, random: Random, prose: Prose) -> list[str]:
    """Eight towns in some order, some times over."""
    line = sentences.listed(random.sample(world.towns, LISTED)) + "."
    return [prose.sentence(), *[line] * _TELLINGS]


def interleaved(parts: list[list[str]], random: Random) -> list[str]:
    """All lines in random order, those of each part in their own."""
    turns = [number for number, part in enumerate(parts) for _ in part]
    random.shuffle(turns)
    lines = [iter(part) for part in parts]
    return [next(lines[turn]) for turn in turns]


def _passers_by(world: World, count: int, random: Random) -> list[str]:
    """Names of different passers-by."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[world.name(world.passer_by(random))] = None
    return list(names)
