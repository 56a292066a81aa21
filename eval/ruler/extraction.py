"""Which words are the most common: of a numbered list (CWE), and of a text in invented words (FWE).

Wording of the `full` profile: NVIDIA's RULER (Apache-2.0). FWE's word of rank k stands n k^-alpha / zeta(alpha) times,
alpha = 2; the first rank is shown as dots, which the question says to ignore.
"""

import string
from dataclasses import dataclass
from itertools import count
from random import Random

from scipy.special import zeta

from eval.ruler.sample import Case, Draft, Plan
from eval.ruler.words import adjectives, compound, nouns

# Up to this length, words are repeated less often.
SHORT = 4096
ALPHA = 2.0
_ASKED = 3


@dataclass(frozen=True)
class Repeats:
    """`words` different words (None: as many as fit), `common` of them `often` times, the others `seldom`."""

    common: int
    often: int
    seldom: int
    words: int | None = None


@dataclass(frozen=True)
class ListWording:
    template: str
    answer_prefix: str
    # The list and its solved example, in contexts from SHORT on and below.
    long: tuple[Repeats, Repeats]
    short: tuple[Repeats, Repeats]


@dataclass(frozen=True)
class CodedWording:
    template: str
    answer_prefix: str
    letters: int


FULL_LIST = ListWording(
    template=(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n{context}\nQuestion: What are the {common} most common words in the above list?"
    ),
    answer_prefix=" Answer: The top {common} words that appear most often in the list are:",
    long=(Repeats(10, 30, 3), Repeats(10, 10, 3, words=40)),
    short=(Repeats(10, 6, 1), Repeats(10, 3, 1, words=20)),
)
_TINY_REPEATS = (Repeats(2, 3, 1), Repeats(2, 2, 1, words=3))
TINY_LIST = ListWording(
    template="Words:\n{context}\nWhich {common} words are the most common?",
    answer_prefix=" Answer:",
    long=_TINY_REPEATS,
    short=_TINY_REPEATS,
)
FULL_CODED = CodedWording(
    template=(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    ),
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    letters=6,
)
TINY_CODED = CodedWording(
    template="Coded text: {context}\nWhich three words are the most common, without the dots?",
    answer_prefix=" Answer:",
    letters=3,
)


def plan_common(case: Case, wording: ListWording) -> Plan:
    """Sizes count different words; the example has words of its own."""
    random = case.random
    asked, shown = wording.long if case.length >= SHORT else wording.short
    assert shown.words is not None
    pool = [*adjectives(), *nouns()]
    random.shuffle(pool)
    example_words, pool = pool[: shown.words], pool[shown.words :]
    order, example_order, more = random.getrandbits(64), random.getrandbits(64), Random(random.getrandbits(64))
    example = _list(wording, shown, example_words, example_order)
    solved = f"{example.input}{example.answer_prefix} {example.answer}\n"
    taken = set(pool)

    def build(size: int) -> Draft:
        while len(pool) < size:
            # Long lists need more words than there are.
            if (word := compound(more)) not in taken:
                taken.add(word)
                pool.append(word)
        draft = _list(wording, asked, pool[:size], order)
        return Draft(solved + draft.input, draft.answer_prefix, draft.outputs, draft.answer)

    return Plan(build, smallest=asked.common + 1)


def _list(wording: ListWording, repeats: Repeats, words: list[str], order: int) -> Draft:
    common, others = words[: repeats.common], words[repeats.common :]
    entries = common * repeats.often + others * repeats.seldom
    Random(order).shuffle(entries)
    return Draft(
        input=wording.template.format(context=_numbered(entries), common=repeats.common),
        answer_prefix=wording.answer_prefix.format(common=repeats.common),
        outputs=tuple(common),
        answer=_numbered(common),
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def plan_coded(case: Case, wording: CodedWording, room: int) -> Plan:
    """Sizes are n. The text has a word for every 50 tokens of its length without `room`, and two unasked ones at least.

    Below the smallest size two of the words that are asked for would be equally common.
    """
    random = case.random
    coded: dict[str, None] = {}
    while len(coded) < max(_ASKED + 2, (case.length - room) // 50):
        coded["".join(random.choices(string.ascii_lowercase, k=wording.letters))] = None
    ranked, order = list(coded), random.getrandbits(64)
    ranked[0] = "..."
    asked = tuple(ranked[1 : 1 + _ASKED])

    def build(size: int) -> Draft:
        text = [word for word, times in zip(ranked, frequencies(size, len(ranked)), strict=True) for _ in range(times)]
        Random(order).shuffle(text)
        return Draft(wording.template.format(context=" ".join(text)), wording.answer_prefix, asked, " ".join(asked))

    return Plan(build, smallest=next(size for size in count(1) if _distinct(size)))


def frequencies(size: int, ranks: int) -> list[int]:
    """How often the words of rank 1, 2, ... stand."""
    return [int(size * rank**-ALPHA / zeta(ALPHA)) for rank in range(1, ranks + 1)]


def _distinct(size: int) -> bool:
    asked = frequencies(size, _ASKED + 2)[1:]
    return all(before > after for before, after in zip(asked, asked[1:], strict=False))
