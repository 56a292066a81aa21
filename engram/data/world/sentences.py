"""Sentences of the world. What can be asked is a stem, which a town completes.

local       Bela Korvin rules | Oken.
far         Bela Korvin, as the old baker met the goat, rules | Oken.
paraphrase  The realm of Bela Korvin is | Oken.
two hops    The realm of Bela Korvin borders | Ilat.
border      Oken borders | Ilat.
needle      The secret word of Bela Korvin is | Oken.
chain       Set Bela Korvin to Oken. Set Tomo Sarin to Bela Korvin. So Tomo Sarin is | Oken.
list        Say Oken Ilat Umed. Say Oken Ilat | Umed.
"""

from dataclasses import dataclass
from random import Random

from engram.data.world.lexicon import ADJECTIVES, NOUNS, RELATIONS, VERBS


@dataclass(frozen=True)
class Prose:
    """Filler. `asking`: the nouns change their roles, so that no eight words of a question stand in training texts."""

    random: Random
    asking: bool = False

    def sentence(self) -> str:
        """Eight tokens with the full stop: `The old baker met the shy goat.`"""
        subject, other = self._nouns()
        first, second = (self.random.choice(ADJECTIVES) for _ in range(2))
        return f"The {first} {subject} {self.random.choice(VERBS)} the {second} {other}."

    def sentences(self, count: int) -> list[str]:
        return [self.sentence() for _ in range(count)]

    def aside(self) -> str:
        """Nine tokens with the commas, to stand between a name and its verb: `, as the old baker met the goat,`."""
        subject, other = self._nouns()
        return f", as the {self.random.choice(ADJECTIVES)} {subject} {self.random.choice(VERBS)} the {other},"

    def _nouns(self) -> tuple[str, str]:
        subjects, others = reversed(NOUNS) if self.asking else NOUNS
        return self.random.choice(subjects), self.random.choice(others)


def local(name: str, relation: int) -> str:
    return f"{name} {RELATIONS[relation][0]}"


def far(name: str, relation: int, prose: Prose) -> str:
    return f"{name}{prose.aside()} {RELATIONS[relation][0]}"


def paraphrase(name: str, relation: int) -> str:
    return f"The {RELATIONS[relation][1]} of {name} is"


def two_hop(name: str, relation: int) -> str:
    return f"The {RELATIONS[relation][1]} of {name} borders"


def border(town: str) -> str:
    return f"{town} borders"


def needle(name: str) -> str:
    return f"The secret word of {name} is"


def links(names: list[str], town: str) -> list[str]:
    """The sentences of a chain, from the town to the last name."""
    return [f"Set {name} to {before}." for name, before in zip(names, [town, *names[:-1]], strict=True)]


def end_of_chain(name: str) -> str:
    return f"So {name} is"


def listed(towns: list[str]) -> str:
    return " ".join(["Say", *towns])
