"""Documents whose key tokens are known: what a far part of the text tells and the near part does not.

A document is random tokens; a few stretches of it stand once more, farther on. A stretch's first tokens say that it is
the same again, so each token after them can be known from its first copy, and from nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram.config import UserError
from eval.long_ppl.measure import Mask


@dataclass(frozen=True)
class CopyText:
    """`tokens`, and for each whether it is told by a stretch that is at least the asked distance away."""

    tokens: list[int]
    key: Mask


def copy_texts(
    count: int, length: int, vocab_size: int, distance: int, seed: int, stretch: int = 12, cue: int = 2, copies: int = 2
) -> list[CopyText]:
    """`count` documents of ids below `vocab_size`, with `copies` stretches each, whose copies begin at least `distance`
    tokens after their end.

    The first `cue` tokens of a copy are no key tokens: nothing announces them. Raises UserError where a document is too
    short for its stretches and their distance.
    """
    part = (length - distance) // (2 * copies)
    if not cue < stretch < part:
        raise UserError(
            f"{copies} stretches of {stretch} tokens and a distance of {distance:,} do not fit into {length:,} tokens: "
            "raise --context, or lower --window"
        )
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        # Where ids suffice, none stands twice but in copies: what leads to a stretch leads to it alone.
        once = vocab_size >= length
        tokens = generator.permutation(vocab_size)[:length] if once else generator.integers(vocab_size, size=length)
        key = np.zeros(length, np.bool_)
        for copy in range(copies):
            source, target = (copy * part + int(generator.integers(part - stretch)) for _ in range(2))
            target += copies * part + distance
            tokens[target : target + stretch] = tokens[source : source + stretch]
            key[target + cue : target + stretch] = True
        texts.append(CopyText(tokens.tolist(), key))
    return texts


@dataclass(frozen=True)
class Agreement:
    """How well an evaluator's key tokens are those that truly are; NaN where there is nothing to divide by."""

    precision: float
    recall: float
    found: int
    true: int


def agreement(masks: Sequence[Mask], truth: Sequence[Mask]) -> Agreement:
    """Precision and recall of `masks` over all tokens."""
    found, true = np.concatenate(list(masks)), np.concatenate(list(truth))
    both = float((found & true).sum())
    return Agreement(_share(both, found.sum()), _share(both, true.sum()), int(found.sum()), int(true.sum()))


def _share(part: float, whole: float) -> float:
    return part / float(whole) if whole else float("nan")
