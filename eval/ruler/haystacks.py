"""What hides the needles: a line of noise again and again, prose, or other needles (see niah.py)."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from engram.config import UserError
from eval.ruler.words import adjectives, nouns

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")

# {a}, {b}: adjectives; {m}, {n}, {o}: nouns. No digits and no words of the tasks.
_SENTENCES = (
    "The {a} {n} stood beside the {m} for most of the day.",
    "Nobody had seen the {n} since the {b} morning.",
    "Under the {m} there was a {a} {n} that people liked.",
    "They carried the {n} past the {b} {m} without a word.",
    "A {a} {n} is worth more than a {b} {m}.",
    "When the rain came, the {n} was left near the {m}.",
    "Her brother painted the {n} and sold the {m}.",
    "It took them a whole week to move the {a} {n}.",
    "In the end the {b} {m} went to the one who had asked for it.",
    "The children spoke of a {n}, of a {m} and of an old {o}.",
    "Some say that the {n} was never {a} at all.",
    "We walked from the {n} to the {m} and back before supper.",
    "There was no {m} in the house, but the {n} was {b} enough.",
    "The road turns at the {n}, goes down to the {m} and ends there.",
    "Whoever finds the {a} {n} may keep the {o} as well.",
    "As for the {m}, it looked {b} from far away and {a} from close by.",
)


@dataclass(frozen=True)
class Essay:
    """A text of the user's, as sentences."""

    sentences: tuple[str, ...]
    sha256: str


def read_essay(path: Path) -> Essay:
    """A UTF-8 text file. Raises UserError: not readable, or less than ten sentences."""
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}): give another file with --essay") from None
    sentences = tuple(re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()))
    if len(sentences) < 10:
        raise UserError(f"{path}: has {len(sentences)} sentences, but a haystack needs at least 10: give a longer text")
    return Essay(sentences, hashlib.sha256(data).hexdigest())


def prose(random: Random, essay: Essay | None) -> Callable[[int], list[str]]:
    """The first n sentences of an endless text: of the essay from a drawn place on and round, or of our templates."""
    if essay is not None:
        start, sentences = random.randrange(len(essay.sentences)), essay.sentences
        return lambda n: [sentences[(start + i) % len(sentences)] for i in range(n)]
    return endless(Random(random.getrandbits(64)), _sentence)


def endless(random: Random, draw: Callable[[Random], str]) -> Callable[[int], list[str]]:
    """The first n of an endless row of texts, which are drawn once, when they are first wanted."""
    drawn: list[str] = []

    def first(n: int) -> list[str]:
        while len(drawn) < n:
            drawn.append(draw(random))
        return drawn[:n]

    return first


def insert(units: Sequence[str], needles: Sequence[str], seed: int) -> list[str]:
    """The needles in their order at random places between the units (as many as needles at least)."""
    places = sorted(Random(seed).sample(range(len(units)), len(needles)))
    whole = list(units)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        whole.insert(place, needle)
    return whole


def _sentence(random: Random) -> str:
    a, b = random.sample(adjectives(), 2)
    n, m, o = random.sample(nouns(), 3)
    return random.choice(_SENTENCES).format(a=a, b=b, n=n, m=m, o=o)
