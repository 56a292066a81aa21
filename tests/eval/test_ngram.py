"""N-gram models against dictionaries and loops, normalisation, and whose context they may use."""

import json
import math
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.data.loader import Batch
from eval import ngram
from eval.ngram import KneserNey, add_one, count_dataset, discounts, queries, score

VOCAB = 7


@dataclass
class Stream:
    """A split in memory."""

    tokens: list[int]
    starts: list[int]
    documents: np.ndarray = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.documents, self.num_tokens = np.array(self.starts), len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.num_tokens
        return np.array(self.tokens[start : start + length])

    def texts(self) -> list[list[int]]:
        ends = [*self.starts[1:], self.num_tokens]
        return [self.tokens[start:end] for start, end in zip(self.starts, ends, strict=True)]


def random_stream(seed: int, size: int = 400, documents: int = 9) -> Stream:
    generator = np.random.default_rng(seed)
    tokens = np.minimum(generator.geometric(0.35, size) - 1, VOCAB - 2).tolist()
    starts = sorted({0, *generator.integers(1, size, documents - 1).tolist()})
    return Stream(tokens, starts)


def grams(stream: Stream, order: int) -> Counter:
    return Counter(
        tuple(text[i : i + order]) for text in stream.texts() for i in range(len(text) - order + 1) if order > 0
    )


def slow_discounts(counts: Counter) -> list[float]:
    n = Counter(counts.values())
    if not all(n[k] for k in (1, 2, 3, 4)):
        return [0.5, 1.0, 1.5]
    y = n[1] / (n[1] + 2 * n[2])
    estimated = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    return [d if 0 < d < k else f for k, d, f in zip((1, 2, 3), estimated, (0.5, 1.0, 1.5), strict=True)]


class SlowKneserNey:
    """Chen and Goodman's equations with dictionaries."""

    def __init__(self, stream: Stream, order: int) -> None:
        self.levels = []
        for level in range(1, order + 1):
            longer = grams(stream, level + 1)
            counts = grams(stream, level) if level == order else Counter(gram[1:] for gram in longer)
            followers = defaultdict(list)
            for gram, count in counts.items():
                followers[gram[:-1]].append(count)
            self.levels.append((counts, followers, slow_discounts(counts)))

    def probability(self, history: tuple[int, ...], token: int) -> float:
        if len(history) + 1 > len(self.levels):
            history = history[-(len(self.levels) - 1) :] if len(self.levels) > 1 else ()
        return self._level(len(history), history, token)

    def _level(self, level: int, history: tuple[int, ...], token: int) -> float:
        lower = self._level(level - 1, history[1:], token) if level else 1 / VOCAB
        counts, followers, discount = self.levels[level]
        if history not in followers:
            return lower
        total = sum(followers[history])
        removed = sum(discount[min(count, 3) - 1] for count in followers[history])
        count = counts[(*history, token)]
        kept = count - discount[min(count, 3) - 1] if count else 0.0
        return kept / total + removed / total * lower


@pytest.fixture(params=[0, 1, 2], ids=["seed0", "seed1", "seed2"])
def stream(request: pytest.FixtureRequest) -> Stream:
    return random_stream(request.param)


def batches_of(stream: Stream, length: int) -> list[Batch]:
    """Rows over the stream as the loader cuts them, written with loops."""
    document = [sum(start <= i for start in stream.starts) - 1 for i in range(stream.num_tokens)]
    rows = range((stream.num_tokens - 1) // length)
    tokens, targets, documents = [], [], []
    for row in rows:
        at = range(row * length, (row + 1) * length)
        tokens.append([stream.tokens[i] for i in at])
        targets.append([stream.tokens[i + 1] if document[i + 1] == document[i] else -100 for i in at])
        documents.append([document[i] - document[row * length] for i in at])
    return [Batch(*(torch.tensor(part) for part in (tokens, targets, documents)))]


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_against_loops(stream: Stream, order: int) -> None:
    raw = count_dataset(stream, VOCAB, stream.num_tokens)
    fast, slow = KneserNey(raw[: order - 1], VOCAB), SlowKneserNey(stream, order)
    histories = np.stack(np.meshgrid(*[np.arange(VOCAB)] * (order - 1), indexing="ij"), -1).reshape(-1, order - 1)
    for token in range(VOCAB):
        expected = [slow.probability(tuple(history), token) for history in histories.tolist()]
        np.testing.assert_allclose(fast.probabilities(histories, np.full(len(histories), token)), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_sum_to_one_for_every_history(stream: Stream, order: int) -> None:
    model = KneserNey(count_dataset(stream, VOCAB, stream.num_tokens)[: order - 1], VOCAB)
    histories = np.stack(np.meshgrid(*[np.arange(VOCAB)] * (order - 1), indexing="ij"), -1).reshape(-1, order - 1)
    every = np.stack([model.probabilities(histories, np.full(len(histories), token)) for token in range(VOCAB)])
    assert (every > 0).all()
    np.testing.assert_allclose(every.sum(0), 1, rtol=1e-12)


def test_unigrams_count_targets_only() -> None:
    # Documents 0 1 | 1 | 1 0 2: the targets are 1, 0, 2.
    stream = Stream([0, 1, 1, 1, 0, 2], [0, 2, 3])
    raw = count_dataset(stream, 4, stream.num_tokens)
    np.testing.assert_allclose(add_one(raw[0], 4), np.array([2, 2, 2, 1]) / 7)


@given(st.integers(1, 60), st.integers(0, 5))
def test_counts_do_not_depend_on_chunks(chunk: int, seed: int) -> None:
    stream = random_stream(seed, size=113)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_CHUNK", chunk)
        counted = count_dataset(stream, VOCAB, 101)
    short = Stream(stream.tokens[:101], [start for start in stream.starts if start < 101])
    for order, found in zip((2, 3), counted, strict=True):
        expected = grams(short, order)
        packed = {sum(t * VOCAB ** (order - 1 - i) for i, t in enumerate(gram)): n for gram, n in expected.items()}
        assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == packed
        assert (np.diff(found.keys) > 0).all()


def test_estimated_discounts() -> None:
    # n1 = 8, n2 = 4, n3 = 2, n4 = 1: Y = 1/2, D1 = 1 - 2 Y 4/8, D2 = 2 - 3 Y 2/4, D3 = 3 - 4 Y 1/2.
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9] * 5)
    np.testing.assert_allclose(discounts(counts), [0.5, 1.25, 2.0])
    np.testing.assert_allclose(discounts(np.array([1, 1, 5])), [0.5, 1.0, 1.5])
    # Y = 1/9: D2 = 2 - 3/9 x 40/4 is negative.
    np.testing.assert_allclose(discounts(np.array([1] + [2] * 4 + [3] * 40 + [4])), [1 - 8 / 9, 1.0, 3 - 4 / 9 / 40])


@pytest.mark.parametrize("length", [5, 16, 399])
def test_losses_use_the_models_targets_and_context(stream: Stream, length: int) -> None:
    """Against a loop over rows: a history ends at its document's start and at its row's start."""
    train, rows = random_stream(11, size=700), batches_of(stream, length)
    bigram, trigram = SlowKneserNey(train, 2), SlowKneserNey(train, 3)
    seconds = [token for text in train.texts() for token in text[1:]]
    losses: dict[str, list[float]] = {"unigram": [], "bigram": [], "trigram": []}
    tokens, targets, documents = (part.tolist() for part in rows[0])
    for row in range(len(tokens)):
        for t, target in enumerate(targets[row]):
            if target == -100:
                continue
            previous = tokens[row][t]
            inside = t > 0 and documents[row][t - 1] == documents[row][t]
            losses["unigram"].append((seconds.count(target) + 1) / (len(seconds) + VOCAB))
            losses["bigram"].append(bigram.probability((previous,), target))
            losses["trigram"].append(
                trigram.probability((tokens[row][t - 1], previous), target) if inside else losses["bigram"][-1]
            )
    found = score(train, rows, VOCAB)
    assert found.targets == len(losses["bigram"]) and found.train_tokens == 700
    for name, probabilities in losses.items():
        expected = -sum(map(math.log, probabilities)) / len(probabilities)
        assert getattr(found, name) == pytest.approx(expected, rel=1e-12), name


def test_queries_of_several_batches_are_one_list(stream: Stream) -> None:
    [whole] = batches_of(stream, 8)
    parts = [Batch(*(part[rows] for part in whole)) for rows in (slice(0, 3), slice(3, None))]
    for one, other in zip(queries([whole]), queries(parts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_trigram_source_is_learned() -> None:
    """Third token = sum of the two before: trigrams predict it, bigrams cannot, unigrams even less."""
    generator = np.random.default_rng(0)
    skewed = generator.choice(VOCAB, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05], size=(4000, 2))
    tokens = np.concatenate([skewed, skewed.sum(1, keepdims=True) % VOCAB], axis=1)
    stream = Stream(tokens.flatten().tolist(), list(range(0, 12000, 3)))
    found = score(stream, batches_of(Stream(stream.tokens[:1201], stream.starts[:401]), 1200), VOCAB)
    assert found.trigram < found.bigram - 0.3 < found.unigram - 0.3
    # The second token of a document cannot be guessed better than its entropy (1.6 nats): half of all targets.
    assert 0.8 < found.trigram < 1.0


def test_prepared_folder_and_cache(prepared_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(prepared_folder, folder, ignore=shutil.ignore_patterns("ngram_*"))
    first = ngram.measure(folder, 16, 4 * 16)
    [cached] = folder.glob("ngram_*.json")
    assert json.loads(cached.read_text()) == first.__dict__
    # The file is what a second call reads ...
    cached.write_text(json.dumps({**first.__dict__, "bigram": -1.0}))
    assert ngram.measure(folder, 16, 4 * 16).bigram == -1.0
    # ... if it can be read ...
    for broken in (b"{", b"[]", b"\xff", b'{"unigram": 1}', b'{"unigram": "x"}'):
        cached.write_bytes(broken)
        assert ngram.measure(folder, 16, 4 * 16) == first
        assert json.loads(cached.read_text()) == first.__dict__
    # ... unless the question is another one.
    other = ngram.measure(folder, 16, None)
    assert other.targets > first.targets and len(list(folder.glob("ngram_*.json"))) == 2


def test_a_read_only_folder_costs_no_error(prepared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError("read-only")

    before = set(prepared_folder.iterdir())
    monkeypatch.setattr(Path, "write_text", refuse)
    assert ngram.measure(prepared_folder, 19, 190).targets > 0
    assert set(prepared_folder.iterdir()) == before
