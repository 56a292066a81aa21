"""Log-probabilities of continuations: the primitive of every task that scores answers.

What requests share is computed once: few-shot prompts and questions as beginnings of several rows, whole rows where
only the last token differs. Logits become float32 before the softmax, sums are float64, and padding stands on the right
where no n-gram sees it: a score does not depend on its batch beyond rounding (within 1e-4 nat in float32).

Under torchrun, inside `eval.ranks.together()`, the processes divide the requests among themselves.

Legend: B rows of a batch, T tokens, D hidden, P positions that are read, S scored tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.config import UserError
from engram.inference.cache import Decoder
from engram.model.transformer import Transformer
from eval import ranks
from eval.padding import pad_right
from eval.prefix_tree import Node, grow

# Logits that exist at once: 64 MiB in float32.
_MAX_LOGITS = 1 << 24
# Tokens whose latents are kept may be this many times the new tokens of a batch: they take much less memory.
_KEPT = 8


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
    model: Transformer,
    requests: Sequence[Request],
    *,
    max_tokens: int = 8192,
    max_length: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Score]:
    """log P(continuation | context) of each request, in their order; batches hold at most `max_tokens` new tokens.

    `advance` is told how many requests were scored. Raises UserError for an empty context or continuation, and for a
    request longer than `max_length` tokens: nothing is ever cut.
    """
    check_requests(requests, max_length)
    # The last token of a row is only a target, so that continuations of one token share a row.
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        owners.setdefault((*request.context, *request.continuation[:-1]), []).append(index)
    # In lexicographic order, rows that share a beginning are neighbours.
    rows = sorted(owners)
    own = ranks.own_part([len(row) for row in rows])
    scorer = _Scorer(model, requests, rows[own.start : own.stop], owners, max_tokens, advance)
    scores = ranks.merged(scorer.run())
    return [scores[index] for index in range(len(requests))]


class _Scorer:
    """Walks the tree of shared beginnings; at each leaf, reads the scores of the requests that the row answers."""

    def __init__(
        self,
        model: Transformer,
        requests: Sequence[Request],
        rows: list[tuple[int, ...]],
        owners: dict[tuple[int, ...], list[int]],
        max_tokens: int,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._model, self._requests, self._rows = model, requests, rows
        self._owners, self._max_tokens, self._advance = owners, max_tokens, advance
        self._device = model.head.weight.device
        self._scores: dict[int, Score] = {}

    def run(self) -> dict[int, Score]:
        # The state after the last given token is read for every request: no beginning reaches further.
        given = [min(len(self._requests[index].context) for index in self._owners[row]) - 1 for row in self._rows]
        self._visit([grow(self._rows, given)], None)
        return self._scores

    def _visit(self, nodes: list[Node], decoder: Decoder | None) -> None:
        """All below `nodes`, which end at the same length and whose tokens the rows of `decoder` have been fed."""
        start = nodes[0].end
        leaves = [(place, row) for place, node in enumerate(nodes) for row in node.leaves]
        for batch in self._batches([len(self._rows[row]) - start for _, row in leaves], start):
            chosen = [leaves[index] for index in batch]
            tokens_BT = pad_right([self._rows[row][start:] for _, row in chosen], self._device)
            if decoder is None:
                hidden_BTD = self._model.hidden(tokens_BT)
            else:
                places_B = torch.tensor([place for place, _ in chosen], device=self._device)
                hidden_BTD = decoder.branch(places_B, start + tokens_BT.shape[1]).hidden(tokens_BT)
            self._read([row for _, row in chosen], hidden_BTD, start)

        by_end: dict[int, list[tuple[int, Node]]] = {}
        for place, node in enumerate(nodes):
            for child in node.children:
                by_end.setdefault(child.end, []).append((place, child))
        for end, found in sorted(by_end.items()):
            for batch in self._batches([end - start] * len(found), start):
                places_B = torch.tensor([found[index][0] for index in batch], device=self._device)
                children = [found[index][1] for index in batch]
                below = Decoder(self._model, len(batch), end) if decoder is None else decoder.branch(places_B, end)
                below.advance(pad_right([self._rows[child.row][start:end] for child in children], self._device))
                self._visit(children, below)

    def _batches(self, lengths: list[int], start: int) -> Iterator[list[int]]:
        """Places of `lengths`, the longest first, in batches that fit."""
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        first = 0
        while first < len(order):
            width = lengths[order[first]]
            fitting = min(self._max_tokens // width, _KEPT * self._max_tokens // (start + width))
            yield order[first : first + max(1, fitting)]
            first += max(1, fitting)

    def _read(self, rows: list[int], hidden_BTD: Tensor, start: int) -> None:
        """Scores of all requests that `rows` answer, from the states of their tokens from `start` on."""
        asked = [(place, index) for place, row in enumerate(rows) for index in self._owners[self._rows[row]]]
        width = hidden_BTD.shape[1]
        # Place of each scored token's state in the flattened batch, and the token.
        wanted, targets = [], []
        for place, index in asked:
            request = self._requests[index]
            first = place * width + len(request.context) - 1 - start
            wanted.append(torch.arange(first, first + len(request.continuation)))
            targets.append(torch.tensor(request.continuation))
        positions_P, which_S = torch.cat(wanted).unique(return_inverse=True)
        target_S, hidden_PD = torch.cat(targets), hidden_BTD.flatten(0, 1)[positions_P.to(self._device)]
        logprob_S = torch.zeros(len(target_S), dtype=torch.float64)
        greedy_S = torch.zeros(len(target_S), dtype=torch.bool)
        chunk = max(1, _MAX_LOGITS // self._model.config.vocab_size)
        for low in range(0, len(positions_P), chunk):
            inside_S = (which_S >= low) & (which_S < low + chunk)
            which, target = (which_S[inside_S] - low).to(self._device), target_S[inside_S].to(self._device)
            logits_PV = self._model.head(hidden_PD[low : low + chunk]).float()
            found = logits_PV[which, target] - logits_PV.logsumexp(-1)[which]
            logprob_S[inside_S] = found.double().cpu()
            greedy_S[inside_S] = (logits_PV.argmax(-1)[which] == target).cpu()
        lengths = [len(tokens) for tokens in targets]
        for (_, index), logprobs, greedy in zip(asked, logprob_S.split(lengths), greedy_S.split(lengths), strict=True):
            self._scores[index] = Score(tuple(logprobs.tolist()), bool(greedy.all()))
        if self._advance is not None:
            self._advance(len(asked))


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
