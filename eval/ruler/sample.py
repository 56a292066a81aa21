"""A sample that fills its length: all that is random is drawn first, then the haystack grows as far as it fits.

A sample depends on its task, length, seed and index, and on the tokenizer: never on how many others there are, on their
order, or on how often sizes were tried on the way.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from engram.config import UserError
from engram.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Case:
    """What a task draws a sample from."""

    random: Random
    length: int
    index: int


@dataclass(frozen=True)
class Draft:
    """A sample of some size. `answer` is what a perfect reader writes after `answer_prefix`; `marks` stand in `input`
    once, where the answers are told."""

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    answer: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sample for each size of its haystack from `smallest` to `largest` (None: without end)."""

    build: Callable[[int], Draft]
    smallest: int
    largest: int | None = None


@dataclass(frozen=True)
class Task:
    """One of the 13. `match`: whether all outputs are wanted, or any one of them (they are aliases).

    `new_tokens`: room for the answer; it grows where an answer needs more. `spare`: room beyond the answer, where there
    is no fixed one.
    """

    name: str
    group: str
    haystack: str
    plan: Callable[[Case], Plan]
    match: str = "all"
    new_tokens: int = 0
    spare: int = 0


@dataclass(frozen=True)
class Sample:
    """`length` counts input, answer prefix and `new_tokens`; depths and the answer's place count tokens."""

    id: str
    task: str
    group: str
    haystack: str
    match: str
    max_length: int
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    answer: str
    length: int
    new_tokens: int
    # Where each mark stands: 0 the start of the input, 1 its end.
    needle_depths: tuple[float, ...]
    # Tokens before the first mark; None where there are no marks.
    token_position_answer: int | None

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


def sample(task: Task, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
    """Sample `index` of a task, as long as fits into `length` tokens with its answer.

    Raises UserError where even the smallest haystack does not fit.
    """
    name = f"{task.name}/{length}/{index}"
    plan = task.plan(Case(Random(hashlib.sha256(f"{seed}/{name}".encode()).digest()), length, index))
    drafts: dict[int, Draft] = {}

    def tokens(size: int) -> int:
        drafts[size] = draft = plan.build(size)
        return len(tokenizer.encode(draft.input + draft.answer_prefix))

    least = tokens(plan.smallest)
    answer_tokens = len(tokenizer.encode(" " + drafts[plan.smallest].answer))
    new_tokens = max(task.new_tokens, answer_tokens + task.spare)
    if least + new_tokens > length:
        raise UserError(
            f"{task.name}: its smallest sample {index} takes {least + new_tokens:,} tokens, but the length is "
            f"{length:,}: raise --lengths, leave the task out with --tasks, or take the tiny --profile if it is full"
        )
    size = largest_fit(tokens, plan.smallest, least, length - new_tokens, plan.largest)
    draft = drafts[size]
    total = len(tokenizer.encode(draft.input + draft.answer_prefix))
    before = [len(tokenizer.encode(draft.input[: _place(draft, mark)])) for mark in draft.marks]
    return Sample(
        id=name,
        task=task.name,
        group=task.group,
        haystack=task.haystack,
        match=task.match,
        max_length=length,
        input=draft.input,
        answer_prefix=draft.answer_prefix,
        outputs=draft.outputs,
        answer=draft.answer,
        length=total + new_tokens,
        new_tokens=new_tokens,
        needle_depths=tuple(round(tokens_before / total, 4) for tokens_before in before),
        token_position_answer=min(before, default=None),
    )


def largest_fit(tokens: Callable[[int], int], smallest: int, least: int, limit: int, largest: int | None = None) -> int:
    """A size whose tokens fit into `limit` while those of the next size do not; `least` are those of `smallest`.

    Each guess follows the tokens per unit so far, and every third one halves what is left: few texts are tokenised.
    """
    low, low_tokens = smallest, least
    high = None if largest is None else largest + 1
    per_unit = max(1.0, least / max(1, smallest))
    tries = 0
    while high is None or high - low > 1:
        tries += 1
        guess = low + max(1, int((limit - low_tokens) / per_unit))
        if high is not None:
            guess = (low + high) // 2 if tries % 3 == 0 else min(guess, high - 1)
        found = tokens(guess)
        per_unit = max(0.25, (found - least) / (guess - smallest))
        if found <= limit:
            low, low_tokens = guess, found
        else:
            high = guess
    return low


def _place(draft: Draft, mark: str) -> int:
    assert draft.input.count(mark) == 1, f"{mark!r} must stand in the input once"
    return draft.input.index(mark)
