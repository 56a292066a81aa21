"""LongPPL against its definition, by plain loops and with an evaluator that copies."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.config import UserError
from engram.model.transformer import IGNORE
from eval.long_ppl.copy_texts import agreement, copy_texts
from eval.long_ppl.measure import Losses, Windows, long_ppl, short_losses, whole_losses
from tests.eval.models import build


class Copier:
    """Predicts the token that followed the last two tokens where they stood before; the loss is low where it is right.

    Counts the tokens that it was fed.
    """

    def __init__(self, cue: int = 2) -> None:
        self.cue, self.fed = cue, 0

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.fed += tokens.numel()
        losses = torch.zeros(tokens.shape)
        for row in range(len(tokens)):
            followed: dict[tuple[int, ...], int] = {}
            ids = tokens[row].tolist()
            for place in range(len(ids)):
                cue = tuple(ids[place + 1 - self.cue : place + 1])
                target = int(targets[row, place])
                if target != IGNORE:
                    losses[row, place] = 0.1 if followed.get(cue) == target else 9.0
                if place + 1 < len(ids):
                    followed[cue] = ids[place + 1]
        return losses


def random_documents(lengths: Sequence[int], vocab_size: int = 50) -> list[list[int]]:
    return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize(("window", "stride"), [(5, 3), (4, 4), (7, 1), (1, 9)])
def test_losses_are_those_of_a_loop_over_tokens(window: int, stride: int) -> None:
    model = build()
    documents = random_documents([23, window + stride + 1, 12])
    windows = Windows(window, stride)

    def loss(context: list[int], token: int) -> float:
        with torch.no_grad():
            return -float(torch.log_softmax(model(torch.tensor([context]))[0, -1].double(), -1)[token])

    # Few tokens in a batch: windows of one document fall into several.
    short = short_losses(model, documents, windows, max_tokens=17)
    whole = whole_losses(model, documents, window, max_tokens=17)
    for document, short_S, whole_S in zip(documents, short, whole, strict=True):
        assert len(short_S) == len(whole_S) == len(document) - window
        for place in range(window, len(document)):
            start = (place - window) // stride * stride
            assert window <= place - start < window + stride
            assert short_S[place - window] == pytest.approx(loss(document[start:place], document[place]), abs=1e-4)
            assert whole_S[place - window] == pytest.approx(loss(document[:place], document[place]), abs=1e-4)


def test_without_thresholds_it_is_the_perplexity_after_the_first_window() -> None:
    model, windows = build(), Windows(6, 4)
    documents = random_documents([31, 20])
    own = whole_losses(model, documents, windows.window)
    judged = [
        Losses(*pair)
        for pair in zip(short_losses(model, documents, windows), whole_losses(model, documents, 6), strict=True)
    ]
    found = long_ppl(own, [each.key(-math.inf, -math.inf) for each in judged])
    assert found.key_tokens == 25 + 14 and found.key_rate == 1
    assert found.long_ppl == pytest.approx(math.exp(np.concatenate(own).mean())) == pytest.approx(found.ppl)
    nothing = long_ppl(own, [each.key(math.inf, -math.inf) for each in judged])
    assert nothing.key_tokens == 0 and math.isnan(nothing.long_ppl) and nothing.ppl == found.ppl


def test_key_tokens_gain_more_than_alpha_and_are_likelier_than_beta() -> None:
    losses = Losses(np.array([5.0, 5.0, 3.9, 3.0, 9.0]), np.array([1.0, 3.0, 1.9, 1.9, 2.0]))
    assert losses.key(2.0, -2.0).tolist() == [True, False, False, False, False]
    assert losses.key(1.0, -2.0).tolist() == [True, False, True, True, False]
    assert losses.key(2.0, -2.1).tolist() == [True, False, False, False, True]


def test_every_key_token_weighs_the_same() -> None:
    masks = [np.array([True, True, True, False]), np.array([False, False]), np.array([True, False])]
    losses = [np.array([1.0, 2.0, 3.0, 50.0]), np.array([70.0, 80.0]), np.array([6.0, 90.0])]
    found = long_ppl(losses, masks)
    assert found.long_ppl == pytest.approx(math.exp((1 + 2 + 3 + 6) / 4))
    assert found.key_sums.tolist() == [6, 0, 6] and found.key_counts.tolist() == [3, 0, 1]
    assert found.key_rate == 4 / 8


def test_a_copier_finds_exactly_the_tokens_that_need_the_far_part() -> None:
    windows = Windows(32, 8)
    texts = copy_texts(6, 256, vocab_size=1000, distance=windows.window + windows.stride, seed=3)
    documents, model = [text.tokens for text in texts], Copier()
    judged = [
        Losses(*pair)
        for pair in zip(
            short_losses(model, documents, windows), whole_losses(model, documents, windows.window), strict=True
        )
    ]
    truth = [text.key[windows.window :] for text in texts]
    found = agreement([each.key(2, -2) for each in judged], truth)
    assert (found.precision, found.recall) == (1, 1) and found.true == found.found == 6 * 2 * 10
    # Whoever needs a longer cue finds fewer; whoever sees the first copy in the short context finds none.
    slow = Copier(cue=5)
    late = [
        Losses(*pair)
        for pair in zip(
            short_losses(slow, documents, windows), whole_losses(slow, documents, windows.window), strict=True
        )
    ]
    fewer = agreement([each.key(2, -2) for each in late], truth)
    assert fewer.precision == 1 and fewer.recall == pytest.approx(0.7)
    wide = Windows(220, 8)
    near = Losses(short_losses(model, documents, wide)[0], whole_losses(model, documents, 220)[0])
    assert not near.key(2, -2).any()


def test_copies_stand_where_they_are_said_to() -> None:
    for text in copy_texts(20, 200, vocab_size=500, distance=60, seed=1, stretch=9, cue=3):
        tokens, places = np.array(text.tokens), np.flatnonzero(text.key)
        assert len(places) == 2 * (9 - 3)
        first = {token: int(np.flatnonzero(tokens == token)[0]) for token in tokens[places].tolist()}
        for place in places.tolist():
            source = first[int(tokens[place])]
            assert place - source >= 60 and tokens[source - 3 : source].tolist() == tokens[place - 3 : place].tolist()
        # Nothing else stands twice.
        assert len(set(tokens.tolist())) == 200 - 2 * 9
    assert copy_texts(1, 200, 20, 60, seed=1)[0].key.sum() == 2 * 10
    with pytest.raises(UserError, match="do not fit into 100 tokens"):
        copy_texts(1, 100, 500, distance=60, seed=0)


def test_agreement_of_nothing_is_no_number() -> None:
    found = agreement([np.zeros(3, np.bool_)], [np.array([True, False, False])])
    assert math.isnan(found.precision) and found.recall == 0
