"""Named entities in texts, from a Few-NERD file or found by their capitals, and the tokens at which they end.

Few-NERD (Ding et al. 2021, arXiv 2105.07464): lines `word <tab> label`, an empty line between sentences, label `O`
outside of entities. Labels do not mark where an entity begins, so neighbours of one label are one entity.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram.config import UserError
from engram.data.tokenizer import REPLACEMENT, Tokenizer
from eval.cka.positions import Positions

Span = tuple[int, int]
# A word that begins with a letter; whether that is a capital is for str to say, in any script that has them.
_WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
_POSSESSIVE = re.compile("['’]s$")
# What stands before a name inside of a sentence, besides letters and digits: else a capital may open a sentence.
_INSIDE = frozenset(",’'”)%")


@dataclass(frozen=True)
class Passage:
    """A text and its entities as [start, end) in characters; `ids`: its tokens, where it came as tokens."""

    text: str
    spans: list[Span]
    ids: list[int] | None = None


@dataclass(frozen=True)
class Mention:
    """The entity that one position stands for."""

    entity: str
    row: int
    position: int
    token: int


@dataclass(frozen=True)
class Entities:
    """One position for each entity: `mentions` were seen, `unique` distinct strings among them, before any limit.

    `unaligned`: entities with no token of their own in the rows, beyond the length or lost by the tokenizer.
    """

    positions: Positions
    chosen: list[Mention]
    mentions: int
    unique: int
    unaligned: int

    @property
    def counts(self) -> dict[str, int]:
        """Of the result's provenance. Where few distinct tokens end the entities, early layers look alike for it."""
        return {
            "used": len(self.chosen),
            "n": self.mentions,
            "n_unique": self.unique,
            "distinct_last_tokens": len({mention.token for mention in self.chosen}),
            "unaligned": self.unaligned,
        }


def read_few_nerd(path: Path) -> list[Passage]:
    """Sentences with the words joined by spaces.

    Raises UserError: not readable, a line that is not `word <tab> label` (its number is named), no entity in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the entities cannot be read: {error}: give a UTF-8 file with --entities") from None
    passages: list[Passage] = []
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip():
            if sentence:
                passages.append(_passage(sentence))
            sentence = []
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not all(field.strip() for field in fields):
            raise UserError(
                f"{path}, line {number}: {line!r} is not `word <tab> label`: give a file as Few-NERD has them"
            )
        sentence.append((fields[0].strip(), fields[1].strip()))
    if not any(passage.spans for passage in passages):
        raise UserError(f"{path}: has no entity: every label is O. Give a labelled file with --entities")
    return passages


def passages_of(documents: Iterable[Sequence[int]], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Documents of a prepared split with the names in them."""
    for document in documents:
        text = tokenizer.decode(document)
        yield Passage(text, names_in(text), list(document))


def names_in(text: str) -> list[Span]:
    """Runs of capitalised words of two letters or more, one space apart, that do not stand where a sentence starts."""
    spans: list[Span] = []
    run: list[Span] = []
    for match in _WORD.finditer(text):
        start, end = match.start(), match.start() + len(_POSSESSIVE.sub("", match[0]))
        capital = text[start].isupper() and end - start > 1 and not match[0].startswith(("I'", "I’"))
        if run and (not capital or text[run[-1][1] : start] != " "):
            spans += _whole(text, run)
            run = []
        if capital:
            run.append((start, end))
    return spans + _whole(text, run)


def entity_positions(
    passages: Iterable[Passage],
    tokenizer: Tokenizer,
    max_length: int,
    max_entities: int | None = None,
    *,
    distinct_last_token: bool = False,
) -> Entities:
    """The first mention of every entity string, at its last token; rows are cut after `max_length` tokens.

    One mention of each: repeated entities are similar to themselves in any two models. `distinct_last_token` takes one
    entity for each last token too. Raises UserError where no entity is left.
    """
    rows: list[list[int]] = []
    chosen: list[Mention] = []
    unique: set[str] = set()
    taken: set[str] = set()
    endings: set[int] = set()
    mentions = unaligned = 0
    for passage in passages:
        names = [passage.text[start:end] for start, end in passage.spans]
        mentions += len(names)
        unique.update(names)
        ids: list[int] | None = None
        for name, (_, end) in zip(names, passage.spans, strict=True):
            if name in taken or (max_entities is not None and len(chosen) >= max_entities):
                continue
            if ids is None:
                ids = (passage.ids if passage.ids is not None else tokenizer.encode(passage.text))[:max_length]
            position = last_token(tokenizer, ids, passage.text[:end])
            if position is None:
                unaligned += 1
                continue
            taken.add(name)
            if distinct_last_token and ids[position] in endings:
                continue
            endings.add(ids[position])
            if not rows or rows[-1] is not ids:
                rows.append(ids)
            chosen.append(Mention(name, len(rows) - 1, position, ids[position]))
    if not chosen:
        raise UserError(
            f"no entity found in the first {max_length:,} tokens of any text: give other --data, or --entities"
        )
    positions = Positions(
        rows,
        np.array([mention.row for mention in chosen]),
        np.array([mention.position for mention in chosen]),
        np.arange(len(chosen)),
    )
    return Entities(positions, chosen, mentions, len(unique), unaligned)


def last_token(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> int | None:
    """Index of the first token by whose end `text`, with which `ids` begin, is complete; None where it never is.

    Found by decoding, so that any tokenizer's pieces do: words in parts, bytes of a character, words with a space.
    """

    def written(count: int) -> int:
        # Bytes that are no whole character yet are shown as U+FFFD.
        return len(tokenizer.decode(ids[:count]).rstrip(REPLACEMENT))

    count = bisect_left(range(len(ids) + 1), len(text), key=written)
    if count > len(ids) or not tokenizer.decode(ids[:count]).startswith(text):
        return None
    return count - 1


def _passage(sentence: Sequence[tuple[str, str]]) -> Passage:
    spans: list[Span] = []
    end, before = -1, "O"
    for word, label in sentence:
        start, end = end + 1, end + 1 + len(word)
        if label != "O":
            spans.append((spans.pop()[0] if label == before else start, end))
        before = label
    return Passage(" ".join(word for word, _ in sentence), spans)


def _whole(text: str, run: Sequence[Span]) -> list[Span]:
    """The run as one span, none where it opens a sentence: its first word is a capital there anyhow."""
    if not run:
        return []
    start, end = run[0][0], run[-1][1]
    before = text[max(0, start - 2) : start]
    inside = len(before) == 2 and before[1] == " " and (before[0].isalnum() or before[0] in _INSIDE)
    return [(start, end)] if inside else []
