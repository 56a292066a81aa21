"""A model's answers to RULER's samples, generated and teacher-forced.

The teacher-forced metrics read the answer a perfect reader writes, token by token, without generating anything: they
move long before a small model writes a right answer.
"""

from collections.abc import Callable, Iterator, Sequence

from engram.config import UserError
from eval.loading import Loaded
from eval.results import Item
from eval.ruler.sample import Sample
from eval.ruler.string_match import string_match
from eval.scoring import Request, score
from eval.stepwise import Question, answer_together

# NVIDIA's score of the generated text; whether greedy decoding would write the answer; its log-probability.
STRING_MATCH, EXACT, LOGPROB = "string_match", "answer_exact", "answer_logprob_per_token"


def check_lengths(lengths: Sequence[int], loaded: Loaded) -> None:
    """Raise UserError for a length beyond the model's context: nothing is cut."""
    context = loaded.config.data.sequence_length
    if (longest := max(lengths)) > context:
        raise UserError(
            f"--lengths has {longest:,}, but {loaded.folder} was trained with {context:,} tokens: lower it, or train "
            "the model on longer sequences first (configs/long_context.yaml); no sample is cut"
        )


def measure(
    loaded: Loaded, samples: Sequence[Sample], generate: bool, advance: Callable[[int], None] | None = None
) -> list[Item]:
    """Items of every metric, whose group is the length; `advance` is told of every sample, and again as it is answered.

    Raises UserError for a sample that is longer than the model's context.
    """
    check_lengths([one.max_length for one in samples], loaded)
    items = list(_forced(loaded, samples, advance))
    if generate:
        asked = [Question(tuple(loaded.encode(one.prompt)), max_new_tokens=one.new_tokens) for one in samples]
        for one, text in zip(samples, answer_together(loaded, asked, advance), strict=True):
            items.append(_item(one, STRING_MATCH, string_match(text, one.outputs, one.match)))
    return items


def _forced(loaded: Loaded, samples: Sequence[Sample], advance: Callable[[int], None] | None) -> Iterator[Item]:
    requests = [request(loaded, one) for one in samples]
    context = loaded.config.data.sequence_length
    scores = score(loaded.model, requests, max_length=context, advance=advance)
    for one, asked, found in zip(samples, requests, scores, strict=True):
        yield _item(one, EXACT, float(found.greedy))
        yield _item(one, LOGPROB, found.logprob / len(asked.continuation))


def request(loaded: Loaded, one: Sample) -> Request:
    """The prompt without the spaces at its end, and the answer after one space.

    Both are encoded as one text. Where its tokens leave those of the prompt alone, the answer begins.
    """
    prompt = one.prompt.rstrip()
    given, whole = loaded.tokenizer.encode(prompt), loaded.tokenizer.encode(f"{prompt} {one.answer}")
    shared = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
    cut = min(shared, len(whole) - 1)
    return Request(tuple(whole[:cut]), tuple(whole[cut:]))


def _item(one: Sample, metric: str, value: float) -> Item:
    return Item(one.task, one.id, metric, value, str(one.max_length))
