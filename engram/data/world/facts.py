"""Who lives in the world and what is true there.

A person is two words of two lists of names. Which persons may be met where is told by the lists alone:

| (first + last) mod 8 | |
|---|---|
| 0 | met in questions only |
| else, in `World.entities` | their facts hold everywhere and are learned |
| else | passers-by: what a document states about them holds in that document alone |
"""

import math
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple

from engram.config import WorldConfig
from engram.data.world.lexicon import invent

_NAMES = 64
_RESIDUES = 8


class Person(NamedTuple):
    """Places of the two words in `World.first_names` and `World.last_names`."""

    first: int
    last: int


@dataclass(frozen=True)
class Entity:
    """A person whose facts are learned: the town of each relation, and how often each of these facts is stated."""

    person: Person
    towns: tuple[int, ...]
    exposures: int
    # Also met in the wordings that questions ask of those who are not taught: a paraphrase, and two facts at once.
    taught: bool


@dataclass(frozen=True)
class World:
    """`borders[x]` is the town that town x borders, a permutation without fixed points."""

    config: WorldConfig
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    towns: tuple[str, ...]
    entities: tuple[Entity, ...]
    borders: tuple[int, ...]

    def name(self, person: Person) -> str:
        return f"{self.first_names[person.first]} {self.last_names[person.last]}"

    def passer_by(self, random: Random) -> Person:
        """A person of whom nothing is learned."""
        while True:
            person = Person(random.randrange(_NAMES), random.randrange(_NAMES))
            if not _only_asked(person) and person not in self._known:
                return person

    def stranger(self, random: Random) -> Person:
        """A person whom no training document names, though each of the two words is known."""
        first = random.randrange(_NAMES)
        return Person(first, (random.randrange(_NAMES // _RESIDUES) * _RESIDUES - first) % _NAMES)

    @cached_property
    def _known(self) -> frozenset[Person]:
        return frozenset(entity.person for entity in self.entities)


def build_world(config: WorldConfig) -> World:
    """The world of these settings, equal on every machine."""
    random = Random(f"world {config.seed}")
    first_names, last_names = invent("cvcv", _NAMES, random), invent("cvcvc", _NAMES, random)
    towns = invent("vcvc", config.values, random)
    persons = [Person(first, last) for first in range(_NAMES) for last in range(_NAMES)]
    sizes = [max(1, min(config.entities_per_level, config.statements_per_level >> i)) for i in range(config.levels)]
    chosen = random.sample([person for person in persons if not _only_asked(person)], sum(sizes))
    columns = [_balanced(config.values, len(chosen), random) for _ in range(config.relations)]
    exposures = [2**level for level, size in enumerate(sizes) for _ in range(size)]
    entities = tuple(
        Entity(person, towns=tuple(column[index] for column in columns), exposures=count, taught=index % 2 == 0)
        for index, (person, count) in enumerate(zip(chosen, exposures, strict=True))
    )
    # A cycle through all towns: no town borders itself.
    cycle = random.sample(range(config.values), config.values)
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return World(config, first_names, last_names, towns, entities, tuple(following[x] for x in range(config.values)))


def _only_asked(person: Person) -> bool:
    return (person.first + person.last) % _RESIDUES == 0


def _balanced(values: int, count: int, random: Random) -> list[int]:
    """`count` values, each as often as every other, in random order."""
    column = (list(range(values)) * math.ceil(count / values))[:count]
    random.shuffle(column)
    return column
