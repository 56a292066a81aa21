"""Answers to prompts of different lengths, without padding: longer prompts are still being read while shorter ones are
answered, so that every row feeds one token at a time and no n-gram sees a token that is not there.

Legend: B rows of a batch, V vocabulary.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engram.inference.cache import Decoder
from engram.inference.generate import choose
from eval import ranks
from eval.loading import Loaded

# Rows that are answered together, and how often their texts are searched for the end.
BATCH_ROWS = 32
# Tokens of prompts that are read at once, with what fills up their equal beginnings.
MAX_TOKENS = 2**15
_LOOK_EVERY = 8


@dataclass(frozen=True)
class Question:
    """A prompt, where its answer ends, and how tokens are chosen (temperature 0: the likeliest)."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    # Tells the draws of equal prompts apart.
    draw: int = 0


def answer(loaded: Loaded, questions: Sequence[Question], advance: Callable[[int], None] | None = None) -> list[str]:
    """The text that follows each prompt, up to the first stop string (which is left out), the end token or the limit.

    A row's draws depend on its prompt and its `draw`, not on its batch.
    """
    answers = [""] * len(questions)
    # Rows of like length: few steps pass until the longest prompt is read.
    order = sorted(range(len(questions)), key=lambda index: (_sampling(questions[index]), len(questions[index].prompt)))
    start = 0
    while start < len(order):
        first = questions[order[start]]
        some = order[start : start + BATCH_ROWS]
        # Longer ones come later: the last one that fits bounds them all.
        fitting = [i for rows, i in enumerate(some, 1) if rows * len(questions[i].prompt) <= MAX_TOKENS] or some[:1]
        batch = [i for i in fitting if _sampling(questions[i]) == _sampling(first)]
        for index, text in zip(batch, _answer_batch(loaded, [questions[i] for i in batch]), strict=True):
            answers[index] = text
        if advance is not None:
            advance(len(batch))
        start += len(batch)
    return answers


def answer_together(
    loaded: Loaded, questions: Sequence[Question], advance: Callable[[int], None] | None = None
) -> list[str]:
    """`answer`, where the processes that torchrun started divide the questions among themselves."""
    own = ranks.own_part([len(one.prompt) + one.max_new_tokens for one in questions])
    texts = answer(loaded, questions[own.start : own.stop], advance)
    found = ranks.merged(dict(zip(own, texts, strict=True)))
    return [found[place] for place in range(len(questions))]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _sampling(question: Question) -> tuple[float, int, float]:
    """What all rows of a batch have in common, in an order."""
    return question.temperature, question.top_k or 0, question.top_p or 0.0


@torch.inference_mode()
def _answer_batch(loaded: Loaded, chosen: Sequence[Question]) -> list[str]:
    model, device = loaded.model, loaded.model.head.weight.device
    rows = [list(question.prompt) for question in chosen]
    generators = [torch.Generator().manual_seed(zlib.crc32(repr((one.prompt, one.draw)).encode())) for one in chosen]
    shortest = min(map(len, rows))
    decoder = Decoder(model, len(rows), max(len(one.prompt) + one.max_new_tokens for one in chosen))
    ended = [question.max_new_tokens == 0 for question in chosen]
    logits_BV = decoder.feed(torch.tensor([row[:shortest] for row in rows], device=device))
    step = 0
    while not all(ended):
        step += 1
        # Rows that are still being read draw nothing: what a row draws does not depend on its neighbours.
        writing = [len(row) == decoder.length and not end for row, end in zip(rows, ended, strict=True)]
        uniform_B = torch.tensor(
            [_uniform(one) if now else 0.0 for one, now in zip(generators, writing, strict=True)], dtype=torch.float64
        )
        first = chosen[0]
        next_B = choose(logits_BV, uniform_B.to(device), first.temperature, first.top_k, first.top_p).tolist()
        for place, (row, question) in enumerate(zip(rows, chosen, strict=True)):
            if not writing[place]:
                continue
            row.append(next_B[place])
            new = len(row) - len(question.prompt)
            ended[place] = row[-1] == loaded.tokenizer.eos_id or new >= question.max_new_tokens
            if question.stops and step % _LOOK_EVERY == 0 and not ended[place]:
                text = loaded.continuation(list(question.prompt), row)
                ended[place] = any(stop in text for stop in question.stops)
        if not all(ended):
            # A row that has ended feeds any token: nobody reads what follows.
            fed = [row[decoder.length] if len(row) > decoder.length else 0 for row in rows]
            logits_BV = decoder.feed(torch.tensor(fed, device=device).unsqueeze(1))
    return [
        cut(loaded.continuation(list(question.prompt), row), question.stops)
        for question, row in zip(chosen, rows, strict=True)
    ]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
