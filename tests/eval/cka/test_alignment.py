"""Alignment against loops, its bias at the edges, and a shift that a test has planted."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.cka.alignment import alignment, measure_alignment, soft_alignment, warped
from eval.cka.positions import Positions
from eval.cka.similarity import Reading
from eval.over_runs import Sample
from tests.eval.models import build
from tests.eval.planted import plant

LAYERS, SHIFT, TOKENS = 14, 3, 400


def falling(layers: int, shift: int = 0, reach: float = 3.0) -> np.ndarray:
    """Similarity [I, J] that falls with the distance between layer i and layer j + shift."""
    index = np.arange(layers)
    return np.exp(-np.abs(index[:, None] - index - shift) / reach)


def sample(matrix: np.ndarray) -> Sample:
    return Sample(matrix, np.stack([matrix, 0.5 * matrix]))


def test_soft_alignment_is_the_mean_of_the_most_similar_layers() -> None:
    similarity = np.random.default_rng(0).uniform(-0.3, 1, size=(2, 7, 4))
    found = soft_alignment(similarity, 3)
    for draw, column in np.ndindex(2, 4):
        best = sorted(enumerate(similarity[draw, :, column], start=1), key=lambda pair: -pair[1])[:3]
        weights = [max(0, value) for _, value in best]
        expected = sum(weight * number for weight, (number, _) in zip(weights, best, strict=True)) / sum(weights)
        assert found[draw, column] == pytest.approx(expected, abs=1e-12)


def test_ties_few_layers_and_nothing_to_weigh() -> None:
    # Of equal rows the lower ones count.
    assert soft_alignment(np.full((9, 1), 0.4), 5).tolist() == [3.0]
    assert soft_alignment([[0.5], [0.25]], 5).tolist() == pytest.approx([4 / 3])
    assert soft_alignment([[0.2], [0.9], [0.8]], 1).tolist() == [2.0]
    assert soft_alignment([[math.nan], [-0.5], [0.3]], 3).tolist() == [3.0]
    assert np.isnan(soft_alignment([[math.nan], [-0.5]], 2)).all()


def test_edges_bend_the_alignment_of_a_model_with_itself() -> None:
    bias = soft_alignment(falling(30), 5) - np.arange(1, 31)
    assert bias[0] == pytest.approx(1.4, abs=0.1) and 0.4 < bias[1] < 1
    np.testing.assert_allclose(bias[2:-2], 0, atol=1e-9)
    np.testing.assert_allclose(bias, -bias[::-1], atol=1e-9)


def test_the_null_takes_the_edges_away_and_leaves_a_shift() -> None:
    found = alignment(sample(falling(30, SHIFT)), sample(falling(30)))
    np.testing.assert_allclose(found.shift.value[2 : -2 - SHIFT], SHIFT, atol=1e-9)
    np.testing.assert_allclose(found.shift.draws[1, 2 : -2 - SHIFT], SHIFT, atol=1e-9)
    none = alignment(sample(falling(30)), sample(falling(30)))
    assert (none.shift.value == 0).all() and none.mean_shift.value == 0
    for how in ("argmax", "dtw"):
        other = alignment(sample(falling(30, SHIFT)), sample(falling(30)), how)
        np.testing.assert_allclose(other.shift.value[2 : -2 - SHIFT], SHIFT, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 2)])
def test_warping_finds_the_best_of_all_paths(shape: tuple[int, int]) -> None:
    similarity = np.random.default_rng(1).uniform(size=(20, *shape))
    found = warped(similarity)
    for index, matrix in enumerate(similarity):
        best = min(paths(*shape), key=lambda path, matrix=matrix: sum(1 - matrix[cell] for cell in path))
        expected = [np.mean([i + 1 for i, j in best if j == column]) for column in range(shape[1])]
        np.testing.assert_allclose(found[index], expected)
    assert np.isnan(warped(np.full(shape, np.nan))).all()


def paths(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """All monotone paths from the first to the last cell."""

    def onward(path: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        i, j = path[-1]
        if (i, j) == (rows - 1, columns - 1):
            return [path]
        steps = [
            (i + down, j + right) for down, right in ((1, 0), (0, 1), (1, 1)) if i + down < rows and j + right < columns
        ]
        return list(itertools.chain.from_iterable(onward([*path, step]) for step in steps))

    return onward([(0, 0)])


def planted_pair() -> tuple[Transformer, Transformer, Positions]:
    """A model whose layer j computes what layer j + 3 of its baseline does, beside noise of its own.

    Every layer keeps 0.8 of its input and adds a wave of it, which is as good as independent: variance stays 1, and
    similarity depends on the distance of layers alone.
    """
    width, changes = 24, {"num_layers": LAYERS, "hidden_size": 32, "vocab_size": TOKENS}
    model, baseline = (build(**changes, hyper_connection=None, memory=None, moe=None) for _ in range(2))
    waves = [(4 * torch.linalg.qr(torch.randn(width, width)).Q, 6.3 * torch.rand(width)) for _ in range(LAYERS + SHIFT)]

    def step(layer: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            signal, noise = x[..., :width], x[..., width:]
            turn, phase = waves[layer]
            return torch.cat([0.8 * signal + 0.6 * 2**0.5 * torch.cos(signal @ turn + phase), noise], -1)

        return run

    for layer in range(LAYERS):
        plant(baseline, layer, step(layer))
        plant(model, layer, step(layer + SHIFT))
    with torch.no_grad():
        baseline.embed.weight.normal_()
        baseline.embed.weight[:, width:] *= 0.3
        x = baseline.embed.weight.clone()
        for layer in range(SHIFT):
            x = step(layer)(x)
        model.embed.weight.copy_(x)
        model.embed.weight[:, width:] = 0.3 * torch.randn(TOKENS, 32 - width)
    every = np.arange(TOKENS)
    return model, baseline, Positions([[token] for token in every.tolist()], every, np.zeros_like(every), every)


def test_a_planted_shift_is_measured() -> None:
    model, baseline, positions = planted_pair()
    found = measure_alignment(model, baseline, positions, reading=Reading(batch=100), draws=200)
    middle = slice(3, LAYERS - SHIFT - 3)
    np.testing.assert_allclose(found.shift.value[middle], SHIFT, atol=0.3)
    assert (np.abs(found.shift.draws[:, middle] - SHIFT) < 0.5).mean() > 0.95
    assert found.aligned.value[0] > SHIFT + 0.5 and found.null.value[0] > 1.5
    same = measure_alignment(baseline, baseline, positions, reading=Reading(batch=100), draws=200)
    assert (same.shift.value == 0).all() and (same.shift.draws == 0).all()
    # Rows are the other baseline's layers: where that is the model, they stand three layers before.
    other = measure_alignment(model, baseline, positions, other_baseline=model, reading=Reading(batch=100), draws=20)
    np.testing.assert_allclose(other.null.value[5:-3] - np.arange(6, LAYERS - 2), -SHIFT, atol=0.3)
    np.testing.assert_allclose(other.aligned.value, found.aligned.value, atol=1e-12)


def test_models_of_unequal_depth_have_no_null() -> None:
    model, baseline = (build(num_layers=layers) for layers in (3, 4))
    one = np.zeros(1, np.int64)
    with pytest.raises(UserError, match="the models have 3 and 4 layers.*equal numbers.*--null none"):
        measure_alignment(model, baseline, Positions([[1]], one, one, one))
