"""Needles in a haystack: `{key}` has `{value}`, told once; which value does the key have?

Wording of the `full` profile: NVIDIA's RULER (Apache-2.0), with its singular forms. The `tiny` one repeats in the
answer prefix the words of the needle, so that a small model need only copy, and sets the values apart from the full
stop, so that they have the same tokens in both places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from eval.ruler.haystacks import NOISE, Essay, endless, insert, prose
from eval.ruler.sample import Case, Draft, Plan
from eval.ruler.words import compound

Kind = Literal["numbers", "words", "uuids"]
# Where needles may stand in prose, in percent of its sentences: RULER's 40 depths.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True)
class Needles:
    """What is hidden and asked: of `num_keys` keys with `num_values` values each, `num_queries` keys."""

    haystack: Literal["noise", "prose", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


@dataclass(frozen=True)
class Wording:
    template: str
    answer_prefix: str
    needle: str
    digits: int
    # Hexadecimal digits of a uuid; None: all, as it is usually written.
    hex_digits: int | None
    # Sentences of noise that make one line.
    noise: tuple[str, ...]
    joined: str
    # What becomes of the template where one value is asked for.
    singular: tuple[tuple[str, str], ...]


FULL = Wording(
    template=(
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?"
    ),
    answer_prefix=" The special magic {kind} for {query} mentioned in the provided text are",
    needle="One of the special magic {kinds} for {key} is: {value}.",
    digits=7,
    hex_digits=None,
    noise=(" ".join(NOISE),),
    joined=", ",
    singular=(("Some", "A"), ("are all", "is"), ("are", "is")),
)
TINY = Wording(
    template="{context}\nWhat are the magic {kind} for {query}?",
    answer_prefix=" The magic {kind} for {query} are",
    needle="The magic {kind} for {key} is {value} .",
    digits=4,
    hex_digits=6,
    noise=NOISE,
    joined=" ",
    singular=(("are", "is"),),
)


def plan(case: Case, needles: Needles, wording: Wording, essay: Essay | None) -> Plan:
    """Sizes count sentences of prose, lines of noise, or further needles."""
    random, taken = case.random, set[str]()
    keys = [_new(random, needles.keys, wording, taken) for _ in range(needles.num_keys)]
    values = [[_new(random, needles.values, wording, taken) for _ in range(needles.num_values)] for _ in keys]
    told = [
        (key, value, _needle(wording, needles.values, key, value))
        for key, own in zip(keys, values, strict=True)
        for value in own
    ]
    lines = [line for _, _, line in told]
    random.shuffle(lines)
    queried = random.sample(keys, needles.num_queries)
    wanted = [(value, line) for query in queried for key, value, line in told if key == query]
    place, depths = random.getrandbits(64), sorted(random.sample(DEPTHS, len(lines)))
    units = _units(random, needles, wording, essay, taken)
    template, answer_prefix, kind = _question(needles, wording)
    query = queried[0] if len(queried) == 1 else ", ".join(queried[:-1]) + ", and " + queried[-1]

    def build(size: int) -> Draft:
        if needles.haystack == "prose":
            context = _in_prose(units(size), lines, depths)
        else:
            context = "\n".join(insert(units(size), lines, place))
        return Draft(
            input=template.format(kind=kind, context=context, query=query),
            answer_prefix=answer_prefix.format(kind=kind, query=query),
            outputs=tuple(value for value, _ in wanted),
            answer=wording.joined.join(value for value, _ in wanted),
            marks=tuple(line for _, line in wanted),
        )

    return Plan(build, smallest=0 if needles.haystack == "prose" else len(lines))


def _units(
    random: Random, needles: Needles, wording: Wording, essay: Essay | None, taken: set[str]
) -> Callable[[int], Sequence[str]]:
    if needles.haystack == "prose":
        return prose(random, essay)
    if needles.haystack == "noise":
        return lambda n: [wording.noise[i % len(wording.noise)] for i in range(n)]

    def other(source: Random) -> str:
        key = _new(source, needles.keys, wording, taken)
        return _needle(wording, needles.values, key, _new(source, needles.values, wording, taken))

    return endless(Random(random.getrandbits(64)), other)


def _in_prose(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    places = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    whole: list[str] = []
    for index, (start, end) in enumerate(zip(places, places[1:], strict=False)):
        whole += sentences[start:end]
        whole += needles[index : index + 1]
    return " ".join(whole)


def _question(needles: Needles, wording: Wording) -> tuple[str, str, str]:
    """Template, answer prefix and the kind of values, in the singular where one value is wanted."""
    template, answer_prefix, kind = wording.template, wording.answer_prefix, str(needles.values)
    if needles.num_queries * needles.num_values > 1:
        return template, answer_prefix, kind
    for plural, singular in wording.singular:
        template, answer_prefix = template.replace(plural, singular), answer_prefix.replace(plural, singular)
    return template, answer_prefix, kind[:-1]


def _needle(wording: Wording, kind: Kind, key: str, value: str) -> str:
    return wording.needle.format(kinds=kind, kind=kind[:-1], key=key, value=value)


def _new(random: Random, kind: Kind, wording: Wording, taken: set[str]) -> str:
    """One that no needle of this sample has, as key or value."""
    while (found := _draw(random, kind, wording)) in taken:
        pass
    taken.add(found)
    return found


def _draw(random: Random, kind: Kind, wording: Wording) -> str:
    if kind == "numbers":
        return str(random.randint(10 ** (wording.digits - 1), 10**wording.digits - 1))
    if kind == "words":
        return compound(random)
    whole = str(UUID(int=random.getrandbits(128), version=4))
    return whole if wording.hex_digits is None else whole.replace("-", "")[: wording.hex_digits]
