"""The words of the world: names and towns made of syllables, relations, and the words of filler prose.

Every word is short and frequent, so that a small vocabulary trained on the world's text holds it as one token.
"""

import itertools
from random import Random

# What a person does with a town, and the noun of the same fact in another wording.
RELATIONS = (
    ("rules", "realm"),
    ("seeks", "goal"),
    ("guards", "post"),
    ("fears", "dread"),
    ("praises", "pride"),
    ("left", "origin"),
)
ADJECTIVES = (
    "old",
    "young",
    "quiet",
    "loud",
    "tall",
    "small",
    "bright",
    "dark",
    "warm",
    "cold",
    "brave",
    "shy",
    "rich",
    "poor",
    "quick",
    "slow",
)
# Filler has its nouns in two roles. In training the first stand before the verb and the second behind it; in what is
# asked it is the other way round, so that no long stretch of a question stands in the training text.
NOUNS = (
    (
        "baker",
        "miller",
        "farmer",
        "sailor",
        "hunter",
        "weaver",
        "tailor",
        "painter",
        "singer",
        "dancer",
        "doctor",
        "teacher",
    ),
    ("horse", "goat", "crow", "wolf", "bear", "swan", "hawk", "otter", "badger", "heron", "rabbit", "salmon"),
)
VERBS = (
    "saw",
    "heard",
    "met",
    "found",
    "chased",
    "followed",
    "watched",
    "helped",
    "called",
    "missed",
    "greeted",
    "painted",
)
_OTHERS = frozenset(("the", "as", "of", "is", "to", "so", "set", "say", "secret", "word", "borders"))

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def invent(shape: str, count: int, random: Random) -> tuple[str, ...]:
    """Distinct capitalised names of a shape, as `cvcv`, none of which is another word of the world in any case."""
    taken = {word for relation in RELATIONS for word in relation} | _OTHERS
    taken |= {*ADJECTIVES, *NOUNS[0], *NOUNS[1], *VERBS}
    letters = [_CONSONANTS if kind == "c" else _VOWELS for kind in shape]
    every = sorted({"".join(name) for name in itertools.product(*letters)} - taken)
    return tuple(name.capitalize() for name in random.sample(every, count))
