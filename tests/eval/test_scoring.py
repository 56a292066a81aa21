"""Scores against one row at a time, and the promises about batches and lengths."""

import pytest
import torch

from engram.config import UserError
from eval.padding import padded_batches
from eval.scoring import Request, score
from tests.eval.models import build


def requests() -> list[Request]:
    lengths = [(1, 1), (5, 3), (9, 1), (2, 7), (5, 3), (13, 2)]
    return [
        Request(tuple(torch.randint(50, (a,)).tolist()), tuple(torch.randint(50, (b,)).tolist())) for a, b in lengths
    ]


def test_scores_are_the_log_softmax_of_each_row_alone() -> None:
    model, asked = build(), requests()
    for request, found in zip(asked, score(model, asked), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.context + request.continuation]))[0].double()
        first = len(request.context) - 1
        expected = [float(logits[first + n].log_softmax(-1)[token]) for n, token in enumerate(request.continuation)]
        assert found.logprobs == pytest.approx(expected, abs=2e-6)
        assert found.logprob == pytest.approx(sum(expected), abs=1e-5)
        assert found.greedy == all(int(logits[first + n].argmax()) == t for n, t in enumerate(request.continuation))


def test_batches_do_not_change_scores() -> None:
    model, asked = build(), requests()
    together, alone = score(model, asked), [score(model, [request])[0] for request in asked]
    for left, right in zip(together, alone, strict=True):
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)


def test_greedy_continuations_are_recognised() -> None:
    model = build()
    context = (3, 1, 4, 1, 5)
    row = list(context)
    with torch.no_grad():
        for _ in range(4):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    best, other = tuple(row[5:]), (*row[5:8], (row[8] + 1) % 50)
    found = score(model, [Request(context, best), Request(context, other)])
    assert [entry.greedy for entry in found] == [True, False]


@pytest.mark.parametrize(
    ("request_", "limit", "message"),
    [
        (Request((), (1,)), None, "empty context"),
        (Request((1,), ()), None, "empty context or continuation"),
        (Request((1,) * 7, (2,) * 2), 8, "has 9 tokens, but the context holds 8"),
    ],
)
def test_refusals(request_: Request, limit: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(build(), [request_], max_length=limit)


def test_padded_batches_hold_every_row_once() -> None:
    rows = [[7] * n for n in (3, 1, 8, 8, 2, 5)]
    batches = list(padded_batches(rows, max_tokens=16, pad_id=9))
    assert [batch.indices for batch in batches] == [[2, 3], [5, 0, 4], [1]]
    for batch in batches:
        assert batch.tokens_BT.numel() <= 16
        for place, index in enumerate(batch.indices):
            assert batch.tokens_BT[place][batch.real_BT[place]].tolist() == rows[index]
            assert (batch.tokens_BT[place][~batch.real_BT[place]] == 9).all()
