"""Which layer of a baseline each layer of a model is like: the Engram paper's soft alignment, and two others.

    a_j = sum_{i in I_j} S_ij i / sum_{i in I_j} S_ij,   I_j = the k rows i of column j with the largest S_ij

S is CKA, clipped at 0, rows the baseline's layers, columns the model's, both numbered from 1. At the edges the k rows
lie on one side alone, so that even a model against itself has a_1 > 1: only a_j less that of a null says something.

Legend: I, J layers of the baseline and of the model, `...` draws or nothing, R draws, M matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.cka.positions import Positions
from eval.cka.similarity import Reading, compare
from eval.over_runs import Sample

Array = npt.NDArray[np.float64]
Align = Callable[[Array], Array]

TOP_K = 5


@dataclass(frozen=True)
class Alignment:
    """For each layer of a model, [J]: the baseline's layer it is like, from 1, that of the null, and the difference."""

    aligned: Sample
    null: Sample
    shift: Sample

    @property
    def mean_shift(self) -> Sample:
        """The difference, averaged over layers, as arrays without axes."""
        return Sample(self.shift.value.mean(-1), self.shift.draws.mean(-1))


def measure_alignment(
    model: Transformer,
    baseline: Transformer,
    positions: Positions,
    *,
    other_baseline: Transformer | None = None,
    reading: Reading | None = None,
    top_k: int = TOP_K,
    draws: int = 2000,
    seed: int = 0,
) -> Alignment:
    """Soft alignment of two models at the positions, whose units are drawn for the intervals.

    The null is the baseline against itself, or against `other_baseline`, the same recipe from another seed. Raises
    UserError for unequal numbers of layers, which have no common null.
    """
    models = [model, baseline, *([] if other_baseline is None else [other_baseline])]
    check_equal_layers([one.config.num_layers for one in models])
    null = (len(models) - 1, 1)
    found = compare(models, [(1, 0), null], positions, reading or Reading())
    return alignment(found.sample((1, 0), draws, seed), found.sample(null, draws, seed), top_k=top_k)


def alignment(similarity: Sample, null: Sample, how: str = "soft", top_k: int = TOP_K) -> Alignment:
    """From CKA [I, J] with its draws, and that of the null; `how` is a name of `aligners`."""
    align = aligners(top_k)[how]
    found, without = (Sample(align(one.value), align(one.draws)) for one in (similarity, null))
    return Alignment(found, without, Sample(found.value - without.value, found.draws - without.draws))


def aligners(top_k: int = TOP_K) -> dict[str, Align]:
    """Ways from CKA [..., I, J] to layers [..., J]."""
    return {
        "soft": lambda similarity: soft_alignment(similarity, top_k),
        "argmax": lambda similarity: soft_alignment(similarity, 1),
        "dtw": warped,
    }


def check_equal_layers(layers: list[int]) -> None:
    """Raise UserError unless all models have as many layers."""
    if len(set(layers)) > 1:
        numbers = " and ".join(str(count) for count in dict.fromkeys(layers))
        raise UserError(
            f"the models have {numbers} layers, but a_j less that of the null needs equal numbers: a matrix and a_j "
            "alone (--null none) are allowed for any"
        )


def soft_alignment(similarity: npt.ArrayLike, top_k: int = TOP_K) -> Array:
    """a_j float64 [..., J] of CKA [..., I, J], with at most I rows; of equal rows the lower comes first.

    NaN similarities weigh nothing; NaN where no weight is left.
    """
    weights = _weights(similarity)
    order = np.argsort(-weights, axis=-2, kind="stable")[..., :top_k, :]
    chosen = np.take_along_axis(weights, order, -2)
    with np.errstate(invalid="ignore"):
        mean = np.asarray((chosen * (order + 1)).sum(-2) / chosen.sum(-2))
    # A mean of rows is no row beyond the last, to the last bit.
    return mean.clip(1, weights.shape[-2])


def warped(similarity: npt.ArrayLike) -> Array:
    """The mean row of each column on the path of dynamic time warping, float64 [..., J].

    From the first layers of both to the last of both, by steps of one layer in either or both, with the least sum of
    1 - S; equal steps go in both. So rows never fall with the columns, and the ends are tied by definition. NaN counts
    as no similarity, and gives NaN where there is nothing else.
    """
    cost_MIJ = 1 - _weights(similarity).clip(max=1)
    shape = cost_MIJ.shape
    cost_MIJ = cost_MIJ.reshape(-1, *shape[-2:])
    total = np.full((len(cost_MIJ), shape[-2] + 1, shape[-1] + 1), np.inf)
    total[:, 0, 0] = 0
    for i in range(shape[-2]):
        for j in range(shape[-1]):
            total[:, i + 1, j + 1] = cost_MIJ[:, i, j] + total[:, i : i + 2, j : j + 2].min((1, 2))
    every = np.arange(len(cost_MIJ))
    row_M, column_M = np.full(len(every), shape[-2]), np.full(len(every), shape[-1])
    sums, counts = np.zeros((len(every), shape[-1])), np.zeros((len(every), shape[-1]))
    steps = np.array([[1, 1], [1, 0], [0, 1]])
    for _ in range(shape[-2] + shape[-1] - 1):
        # A path that has arrived stays outside, in row and column 0.
        inside = np.flatnonzero((row_M > 0) & (column_M > 0))
        sums[inside, column_M[inside] - 1] += row_M[inside]
        counts[inside, column_M[inside] - 1] += 1
        before = np.stack([total[inside, row_M[inside] - down, column_M[inside] - left] for down, left in steps])
        step = steps[before.argmin(0)]
        row_M[inside] -= step[:, 0]
        column_M[inside] -= step[:, 1]
    sums[np.isnan(np.asarray(similarity).reshape(cost_MIJ.shape)).all((1, 2))] = np.nan
    return (sums / counts).reshape(*shape[:-2], shape[-1])


def _weights(similarity: npt.ArrayLike) -> Array:
    return np.nan_to_num(np.asarray(similarity, np.float64)).clip(min=0)
