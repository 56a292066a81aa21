"""Scores against one row at a time, and the promises about batches, shared beginnings, processes and lengths."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import UserError
from engram.model.transformer import Transformer
from eval import scoring
from eval.padding import padded_batches
from eval.scoring import Request, Score, score
from tests.eval.models import MEMORY, build

ROOT = Path(__file__).parents[2]


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


def plain(model: Transformer, asked: Sequence[Request]) -> list[Score]:
    """One forward pass of a whole row for each request."""
    found = []
    for request in asked:
        with torch.no_grad():
            logits = model(torch.tensor([request.context + request.continuation]))[0, len(request.context) - 1 : -1]
        targets = torch.tensor(request.continuation)
        logprobs = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        found.append(Score(tuple(logprobs.tolist()), bool((logits.argmax(-1) == targets).all())))
    return found


def assert_equal(found: Sequence[Score], expected: Sequence[Score], tolerance: float = 1e-4) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.logprobs == pytest.approx(right.logprobs, abs=tolerance)


@pytest.mark.parametrize("max_tokens", [8, 64, 8192])
def test_batches_do_not_change_scores(max_tokens: int) -> None:
    """A batch of 1 and a batch of 8 within 1e-4 nat in float32 (here far closer)."""
    model, asked = rough(), [*requests(), *benchmark(docs=3)]
    assert_equal(score(model, asked, max_tokens=max_tokens), [score(model, [one])[0] for one in asked], 2e-5)


def rough() -> Transformer:
    """A model whose memory's convolution, gates and streams all differ from their start."""
    model = build(memory={**MEMORY, "layer_ids": [0, 2], "conv": {"zero_init": False}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def drawn(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(50, (length,)).tolist())


def benchmark(docs: int, shots: int = 41) -> list[Request]:
    """A few-shot prompt, questions of different lengths, four answers each, some of one token."""
    prompt = drawn(shots)
    asked = []
    for doc in range(docs):
        question = prompt + drawn(17 + 5 * doc)
        asked += [Request(question, drawn(1 if doc % 2 else 2 + choice)) for choice in range(4)]
    return asked


def test_shared_beginnings_do_not_change_scores() -> None:
    model, asked = rough(), benchmark(docs=5)
    order = torch.randperm(len(asked)).tolist()
    shuffled = [asked[index] for index in order]
    assert_equal(score(model, shuffled, max_tokens=128), plain(model, shuffled))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=12))
def test_any_nesting_of_beginnings(cuts: list[tuple[int, int, int]]) -> None:
    """Rows that are beginnings of each other, equal requests, contexts that hold others' continuations."""
    text = tuple(n * n % 47 for n in range(60))
    asked = [Request((*text[:cut], *([cut % 50] * extra)), text[:count]) for cut, extra, count in cuts]
    assert_equal(score(NESTED, asked, max_tokens=256), plain(NESTED, asked))


NESTED = build()


def test_a_beginning_is_computed_once() -> None:
    """Tokens that pass through the first block: the prompt once, each question once, answers with a short rest."""
    model, asked = rough(), benchmark(docs=8, shots=160)
    passed = 0

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal passed
        passed += inputs[0].shape[0] * inputs[0].shape[1]

    model.embed.register_forward_pre_hook(count)
    score(model, asked)
    naive = sum(len(request.context) + len(request.continuation) - 1 for request in asked)
    assert passed < 0.2 * naive


def test_a_row_serves_all_continuations_of_one_token() -> None:
    model, context = build(), drawn(9)
    rows = []
    model.embed.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs[0].tolist()))
    found = score(model, [Request(context, (token,)) for token in range(50)])
    assert rows == [list(context)]
    assert sum(torch.tensor([one.logprob for one in found]).exp()) == pytest.approx(1, abs=1e-5)


def test_logits_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = rough(), benchmark(docs=3)
    whole = score(model, asked)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 120)
    assert_equal(score(model, asked), whole, 1e-5)


def test_progress_counts_every_request() -> None:
    told: list[int] = []
    asked = benchmark(docs=3)
    score(build(), asked, advance=told.append)
    assert sum(told) == len(asked)


RANKS = """
import sys, torch
from eval import ranks
from eval.scoring import score
from tests.eval.test_scoring import benchmark, rough
torch.set_num_threads(1)
torch.manual_seed(5)
model, asked, rows = rough(), benchmark(docs=4), []
alone = score(model, asked)
model.embed.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel()))
with ranks.together() as rank:
    together = score(model, asked)
    mine = sum(rows)
rows.clear()
score(model, asked)
assert mine < 0.75 * sum(rows), (mine, sum(rows))
worst = max(abs(a.logprob - b.logprob) for a, b in zip(alone, together, strict=True))
assert worst < 1e-4, worst
"""


def test_processes_divide_the_requests(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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
