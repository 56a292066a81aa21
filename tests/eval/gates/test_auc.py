"""The matched AUC and its interval against counting pairs one by one."""

import numpy as np
import pytest

from eval.gates.auc import Auc, matched_auc, octave


def by_hand(scores, marked, control, bins, weights=None):
    """Wins over pairs, a tie is half; `weights` says how often each token counts."""
    wins = pairs = 0.0
    for i in np.flatnonzero(marked):
        for j in np.flatnonzero(control):
            if bins[i] == bins[j]:
                weight = 1.0 if weights is None else weights[i] * weights[j]
                pairs += weight
                wins += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return wins / pairs


def tokens(n=400, documents=12):
    """Scores of few values, so that ties abound; some documents have no marked token, some bins no control."""
    rng = np.random.default_rng(3)
    document = np.sort(rng.integers(documents, size=n))
    bins = rng.integers(5, size=n)
    marked = (rng.random(n) < 0.15) & (document % 3 > 0)
    control = ~marked & (rng.random(n) < 0.8) & (bins != 4)
    scores = np.stack([rng.integers(6, size=n) + marked, rng.random(n)]).astype(np.float32)
    return scores, marked, control, bins, document


def test_pairs_of_the_same_bin_with_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, marked, control, bins, document = tokens()
    whole = matched_auc(scores, marked, control, bins, document, draws=50)
    for found, own in zip(whole, scores, strict=True):
        assert found.value == pytest.approx(by_hand(own, marked, control, bins), abs=1e-12)
    # In many small parts: the same.
    monkeypatch.setattr("eval.gates.auc._PAIRS_AT_ONCE", 100)
    assert matched_auc(scores, marked, control, bins, document, draws=50) == whole


def test_draws_are_of_whole_documents() -> None:
    scores, marked, control, bins, document = tokens(n=160)
    found = matched_auc(scores, marked, control, bins, document, draws=80, level=0.8, seed=5)
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(12, np.full(12, 1 / 12), size=80)
    for one, own in zip(found, scores, strict=True):
        values = [by_hand(own, marked, control, bins, counts[document]) for counts in drawn]
        assert (one.low, one.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])), abs=1e-12)


def test_a_score_that_separates_and_one_that_means_nothing() -> None:
    rng = np.random.default_rng(0)
    document, bins = np.repeat(np.arange(40), 50), np.tile(np.arange(50) // 10, 40)
    marked = rng.random(2000) < 0.1
    noise = rng.random(2000)
    better, none, worse = matched_auc(
        np.stack([noise + 2 * marked, noise, -1.0 * marked]), marked, ~marked, bins, document
    )
    assert better == Auc(1.0, 1.0, 1.0) and better.verdict == "higher"
    assert none.low < 0.5 < none.high and none.verdict == "not resolved"
    assert worse.value == 0.0 and worse.verdict == "lower"


def test_position_alone_does_not_count() -> None:
    """A score that only grows with position, and marked tokens that stand late: 1 in all, 0.5 within positions."""
    position = np.tile(np.arange(8), 30)
    marked = (position > 3) & (np.arange(240) % 3 == 0)
    document = np.repeat(np.arange(30), 8)
    (within,) = matched_auc(position[None].astype(float), marked, ~marked, position, document)
    (all_in_one,) = matched_auc(position[None].astype(float), marked, ~marked, np.zeros(240, int), document)
    assert within.value == 0.5 and all_in_one.value > 0.7


def test_without_pairs_nothing_is_claimed() -> None:
    (found,) = matched_auc(np.ones((1, 4)), np.zeros(4, bool), np.ones(4, bool), np.zeros(4, int), np.arange(4))
    assert np.isnan(found.value) and found.verdict == "not resolved"


def test_octaves() -> None:
    assert octave(np.array([0, 1, 2, 3, 6, 7, 14, 15])).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_one_document_tells_no_spread() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 0.0]])
    marked = np.array([True, False, True, False])
    for document, spread in (([0, 0, 0, 0], False), ([0, 0, 1, 1], True)):
        (one,) = matched_auc(scores, marked, ~marked, np.zeros(4, int), np.array(document))
        assert one.value == 0.75 and np.isnan(one.low) != spread
        assert spread or one.verdict == "not resolved"
