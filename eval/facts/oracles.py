"""Certificates: which sets a table of n-grams, a copier and a guesser can answer, so that a set means what it says.

All of them read words; the small vocabulary of a world holds each word as one token.

Legend: V towns.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engram.data.world import World, documents
from eval.bootstrap import interval
from eval.facts.questions import SETS, Question, ask

Floats = npt.NDArray[np.float64]

# What each oracle has to answer; everything else it must not answer better than guessing does.
SOLVES = {
    "n-gram table": frozenset({"local_fact"}),
    "copier": frozenset({"context_fact", "conflict", "copy", "niah"}),
    "guesser": frozenset[str](),
}
# An oracle solves a set from here on, and leaves it unsolved while its interval reaches down to chance, or to this many
# times chance where it only knows which towns are frequent.
_SOLVED = 0.98
_FREQUENT = 2.0
_LONGEST_KEY = 3


class Oracle(Protocol):
    def scores(self, question: Question) -> Floats:
        """[V], the higher the likelier; all equal where it knows nothing."""
        ...


@dataclass(frozen=True)
class Certificate:
    """How often one oracle answers one set, with the ends of the 99 % interval, and whether that is as it must be."""

    oracle: str
    task: str
    accuracy: float
    low: float
    high: float
    chance: float
    solves: bool
    holds: bool


class NgramTable:
    """Counts of the towns behind the last three, two or one words: the longest key that was ever seen decides.

    Its keys are as long as those of a memory of n-grams up to three.
    """

    def __init__(self, texts: Iterable[str], towns: Sequence[str]) -> None:
        self._places = {town: place for place, town in enumerate(towns)}
        self._counts: dict[tuple[str, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            found = words(text)
            for index, word in enumerate(found):
                if word in self._places:
                    for length in range(1, min(index, _LONGEST_KEY) + 1):
                        self._counts[tuple(found[index - length : index])][self._places[word]] += 1

    def scores(self, question: Question) -> Floats:
        scores = np.zeros(len(self._places))
        found = words(question.prompt)
        for length in range(_LONGEST_KEY, 0, -1):
            counts = self._counts.get(tuple(found[-length:]))
            if counts:
                scores[list(counts)] = list(counts.values())
                break
        return scores


class Copier:
    """What stood behind the latest of the longest earlier copies of the prompt's end."""

    def __init__(self, towns: Sequence[str]) -> None:
        self._places = {town: place for place, town in enumerate(towns)}

    def scores(self, question: Question) -> Floats:
        found, scores = words(question.prompt), np.zeros(len(self._places))
        longest = 0
        for end in range(len(found) - 1, 0, -1):
            length = 0
            while length < end and found[end - 1 - length] == found[-1 - length]:
                length += 1
            if length > longest:
                longest, following = length, found[end]
        if longest and following in self._places:
            scores[self._places[following]] = 1
        return scores


class Guesser:
    def __init__(self, towns: Sequence[str]) -> None:
        self._towns = len(towns)

    def scores(self, question: Question) -> Floats:
        random = Random(f"guess {question.task} {question.id}")
        return np.array([random.random() for _ in range(self._towns)])


def certify(world: World, sets: tuple[str, ...] = SETS) -> list[Certificate]:
    """Every oracle on every set."""
    oracles: dict[str, Oracle] = {
        "n-gram table": NgramTable(documents(world), world.towns),
        "copier": Copier(world.towns),
        "guesser": Guesser(world.towns),
    }
    asked: dict[str, list[Question]] = {name: ask(world, (name,)) for name in sets}
    return [_certificate(name, oracle, questions) for name, oracle in oracles.items() for questions in asked.values()]


def overlap(questions: Iterable[Question], texts: Iterable[str], length: int = 8) -> list[str]:
    """Prompts that share `length` words in a row with any of the texts."""
    seen = {gram for text in texts for gram in _grams(words(text), length)}
    return [question.prompt for question in questions if not seen.isdisjoint(_grams(words(question.prompt), length))]


def words(text: str) -> list[str]:
    """Words and marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def credit(scores: Floats, gold: int) -> float:
    """1 where the gold answer alone scores highest, 1/n where n answers do and it is one of them."""
    return float(scores[gold] == scores.max()) / int((scores == scores.max()).sum())


def _certificate(name: str, oracle: Oracle, questions: Sequence[Question]) -> Certificate:
    scores = [oracle.scores(question) for question in questions]
    right = [credit(found, question.gold) for found, question in zip(scores, questions, strict=True)]
    chance, task = 1 / len(scores[0]), questions[0].task
    found = interval(right, level=0.99, draws=1000)
    solves = task in SOLVES[name]
    holds = found.mean >= _SOLVED if solves else found.low <= chance or found.mean <= _FREQUENT * chance
    return Certificate(name, task, float(found.mean), float(found.low), float(found.high), chance, solves, bool(holds))


def _grams(found: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}
