"""Our models behind lm-eval's interface: any of its tasks can be run on a checkpoint.

Differs from lm-eval's own Hugging Face backend where that would change scores silently: nothing is padded on the left
(n-grams would see it), logits are float32 before the softmax, and a text that is too long is an error unless cutting it
is allowed, and then counted for each task. Importing this file needs the extra `eval`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engram.config import UserError
from eval import ranks
from eval.loading import Loaded
from eval.score_cache import ScoreCache
from eval.scoring import Request, score
from eval.stepwise import Question, answer_together

MAX_NEW_TOKENS = 256
# Answers that are computed before they are kept: many enough to share their beginnings and to fill batches.
KEPT_AT_ONCE = {"loglikelihood": 2048, "generate_until": 256}


@dataclass
class Counts:
    """By task: requests, questions (by their number) whose beginning was cut off, requests whose first scored token
    began in the context, and those whose first scored token has no context at all."""

    requests: Counter[str] = field(default_factory=Counter)
    truncated: defaultdict[str, set[int | None]] = field(default_factory=lambda: defaultdict(set))
    merged: Counter[str] = field(default_factory=Counter)
    # After the end of a document: what training never scores.
    after_end: Counter[str] = field(default_factory=Counter)


class Origin(NamedTuple):
    """What a request was made for; all choices of a question share it."""

    task: str
    question: int | None


class EngramLM(TemplateLM):
    """A checkpoint that lm-eval can ask.

    `max_length`: tokens that the model reads at once; None: its sequence length in training. `rolling_context`: how
    many tokens of history the windows of a long text get at least; None: half of `max_length`, 1: as lm-eval does,
    which makes the first n-grams of each window blind. Under torchrun every process asks for everything, and the
    scoring divides it (see eval/ranks.py): lm-eval itself sees one process.
    """

    def __init__(
        self,
        loaded: Loaded,
        cache: ScoreCache,
        *,
        max_length: int | None = None,
        allow_truncation: bool = False,
        rolling_context: int | None = None,
        max_tokens: int = 8192,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._loaded, self._cache, self._advance = loaded, cache, advance
        self.max_length = max_length or loaded.config.data.sequence_length
        self._allow_truncation = allow_truncation
        self._rolling_context = rolling_context or max(1, self.max_length // 2)
        self._max_tokens = max_tokens
        self.counts = Counts()

    @property
    def eot_token_id(self) -> int:
        return self._loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        # Documents follow each other in training, each closed by its end, and none has a token for its start.
        return self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids without special tokens, whatever is asked for: training texts had none inside."""
        return self._loaded.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log P(continuation | context), whether greedy decoding writes it) of each (context, continuation)."""
        pairs = [cast(tuple[str, str], request.args) for request in requests]
        encoded = self._encode_pairs([_origin(request) for request in requests], pairs)
        return self._loglikelihood_tokens([(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = self._answered("loglikelihood", asked, self._score)
        return [(float(logprob), bool(greedy)) for logprob, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of each whole text; windows after the first keep `rolling_context` tokens of history."""
        windows: list[list[Any]] = []
        for request in requests:
            self.counts.requests[request.task_name or ""] += 1
            self.counts.after_end[request.task_name or ""] += 1
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=self._rolling_context,
            )
            windows.append([tuple(map(tuple, make_disjoint_window(window))) for window in rolled])
        flat = [window for text in windows for window in text]
        found = iter(self._answered("loglikelihood", flat, self._score))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings."""
        questions = [self._question(_origin(request), *request.args) for request in requests]
        # A task may ask for several answers to one prompt: each is another draw.
        seen: Counter[Question] = Counter()
        for place, question in enumerate(questions):
            questions[place] = replace(question, draw=seen[question])
            seen[question] += 1
        return self._answered("generate_until", questions, self._generate)

    def _encode_pairs(
        self, origins: Sequence[Origin], pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[list[int], list[int]]]:
        """lm-eval's split: spaces at the context's end go over, both are encoded as one text and cut where the context
        alone would end. At least one token is scored, also where the cut falls inside the last one."""
        moved = [_move_spaces(*pair) for pair in pairs]
        texts = list(dict.fromkeys(text for pair in moved for text in (pair[0], pair[0] + pair[1])))
        ids = dict(zip(texts, self._loaded.tokenizer.encode_batch(texts), strict=True))
        split: list[tuple[list[int], list[int]]] = []
        for origin, (context, continuation) in zip(origins, moved, strict=True):
            task = origin.task
            self.counts.requests[task] += 1
            whole, given = ids[context + continuation], ids[context]
            if not whole:
                raise UserError(f"task {task}: a request has neither context nor answer: repair its data")
            if given:
                self.counts.merged[task] += whole[: len(given)] != given
                end = min(len(given), len(whole) - 1) or 1
                context_ids, continuation_ids = whole[:end], whole[end:]
            else:
                context_ids, continuation_ids = [self.prefix_token_id], whole
            if not continuation_ids:
                # One token holds both: it is scored after the start of a text.
                context_ids, continuation_ids = [self.prefix_token_id], whole
            self.counts.after_end[task] += continuation_ids is whole
            split.append((self._fit(origin, context_ids, len(continuation_ids) - 1), continuation_ids))
        return split

    def _question(self, origin: Origin, context: str, settings: dict[str, Any]) -> Question:
        until = settings.get("until") or ()
        new = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        self.counts.requests[origin.task] += 1
        return Question(
            prompt=tuple(self._fit(origin, self.tok_encode(context) or [self.prefix_token_id], new)),
            stops=(until,) if isinstance(until, str) else tuple(until),
            max_new_tokens=new,
            temperature=temperature,
            top_k=settings.get("top_k") if temperature else None,
            top_p=settings.get("top_p") if temperature else None,
        )

    def _fit(self, origin: Origin, context: list[int], more: int) -> list[int]:
        """The context, or its end where it does not fit beside `more` tokens and may be cut. Raises UserError."""
        room = self.max_length - more
        if len(context) <= room:
            return context
        if not self._allow_truncation or room < 1:
            needed = len(context) + more
            raise UserError(
                f"task {origin.task}: a request needs {needed:,} tokens, but max_length is {self.max_length:,}: "
                "use fewer shots, raise max_length, or set allow_truncation: true"
                + (" (here even the answer alone is too long)" if room < 1 else "")
            )
        self.counts.truncated[origin.task].add(origin.question)
        return context[-room:]

    def _answered(self, kind: str, asked: Sequence[Any], find: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Answers from the cache, and from the model where there are none."""
        keys = [[kind, _plain(one)] for one in asked]
        # One process reads the file, so that all agree on what is still to be computed.
        known = ranks.shared(self._cache.get(keys) if ranks.world()[0] == 0 else {})
        if bad := [one for one in known.values() if not _is_answer(kind, one)]:
            raise UserError(f"the cache holds {bad[0]!r}, which is no answer: delete it, or name another with --cache")
        if self._advance is not None and known:
            self._advance(len(known))
        # Neighbours have much in common, and are asked together.
        missing = sorted(
            (place for place in range(len(asked)) if place not in known), key=lambda place: _order(asked[place])
        )
        at_once = KEPT_AT_ONCE[kind]
        for some in (missing[start : start + at_once] for start in range(0, len(missing), at_once)):
            found = find([asked[place] for place in some])
            # What is interrupted later has these.
            if ranks.world()[0] == 0:
                self._cache.put((keys[place], one) for place, one in zip(some, found, strict=True))
            known.update(zip(some, found, strict=True))
        return [known[place] for place in range(len(asked))]

    def _score(self, asked: Sequence[Any]) -> list[Any]:
        requests = [Request(*pair) for pair in asked]
        scores = score(self._loaded.model, requests, max_tokens=self._max_tokens, advance=self._advance)
        return [(one.logprob, one.greedy) for one in scores]

    def _generate(self, questions: Sequence[Question]) -> list[Any]:
        return list(answer_together(self._loaded, questions, self._advance))


def _origin(request: Instance) -> Origin:
    return Origin(request.task_name or "", request.doc_id)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _is_answer(kind: str, found: Any) -> bool:
    if kind == "generate_until":
        return isinstance(found, str)
    return isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[0], float) and found[0] <= 0


def _order(request: Any) -> tuple[int, ...]:
    return request.prompt if isinstance(request, Question) else request[0]


def _plain(request: Any) -> Any:
    return vars(request) if isinstance(request, Question) else request
