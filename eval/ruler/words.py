"""Plain English words that name things in the tasks: two lists of this package, in fixed order."""

import functools
from pathlib import Path
from random import Random


@functools.cache
def adjectives() -> tuple[str, ...]:
    return _read("adjectives")


@functools.cache
def nouns() -> tuple[str, ...]:
    return _read("nouns")


def compound(random: Random) -> str:
    """`quick-otter`."""
    return f"{random.choice(adjectives())}-{random.choice(nouns())}"


def _read(name: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name("words").joinpath(f"{name}.txt").read_text(encoding="utf-8").split())
