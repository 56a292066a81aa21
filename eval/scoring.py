"""Log-probabilities of continuations: the primitive of every task that scores answers.

Logits become float32 before the softmax, sums are float64; a score does not depend on its batch beyond rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.padding import padded_batches


@dataclass(frozen=True)
class Request:
    """Tokens that are given, and tokens to score after them."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Log-probability in nats of each token of a continuation, and whether each was the likeliest."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


@torch.inference_mode()
def score(
    model: Transformer, requests: Sequence[Request], *, max_tokens: int = 8192, max_length: int | None = None
) -> list[Score]:
    """log P(continuation | context) of each request, in their order; batches hold at most `max_tokens` tokens.

    Raises UserError for an empty context or continuation, and for a request longer than `max_length` tokens: nothing is
    ever cut.
    """
    check_requests(requests, max_length)
    device = model.head.weight.device
    scores: list[Score | None] = [None] * len(requests)
    # The last token of a row is only a target.
    rows = [(*request.context, *request.continuation[:-1]) for request in requests]
    for batch in padded_batches(rows, max_tokens, device):
        hidden_BTD = model.hidden(batch.tokens_BT)
        for row, index in enumerate(batch.indices):
            request = requests[index]
            first = len(request.context) - 1
            logits_ND = model.head(hidden_BTD[row, first : first + len(request.continuation)]).float()
            targets_N1 = torch.tensor(request.continuation, device=device).unsqueeze(1)
            logprobs_N = torch.log_softmax(logits_ND, dim=-1).gather(1, targets_N1).squeeze(1)
            greedy = bool((logits_ND.argmax(-1) == targets_N1.squeeze(1)).all())
            scores[index] = Score(tuple(logprobs_N.double().tolist()), greedy)
    return [found for found in scores if found is not None]


def check_requests(requests: Sequence[Request], max_length: int | None) -> None:
    """Raise UserError for a request that cannot be scored whole."""
    for index, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise UserError(f"request {index} has an empty context or continuation: both need at least one token")
        length = len(request.context) + len(request.continuation)
        if max_length is not None and length > max_length:
            raise UserError(
                f"request {index} has {length:,} tokens, but the context holds {max_length:,}: shorten it, or choose a "
                "model with a longer context; nothing is cut silently"
            )
