"""CKA between all layers of several models at the same positions, in one pass over the texts.

Legend: N positions of a batch, L layers, D hidden, P, Q layers of two models, U units, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from engram.model.transformer import Transformer
from eval.bootstrap import Array, means, resampled_means
from eval.cka.hsic import StreamingHsic, cka, contributions
from eval.cka.positions import Positions, check_stream, read_states, shuffled_batches
from eval.over_runs import Sample
from eval.points import Point

# Two models by their places in a list: rows and columns of a matrix.
Pair = tuple[int, int]
# Numbers of all states held at once: 2^26 float32 values are 256 MiB.
_STATES = 2**26


@dataclass(frozen=True)
class Reading:
    """What is compared: the states at `point`, of one residual `stream` or merged (None).

    `unit_norm`: divided by its own norm, as what reads the streams does, so that no single state is an outlier by its
    size. `batch`: positions of one batch at least; `exact`: also the value over all positions at once.
    """

    point: Point = "resid_post"
    stream: int | None = None
    unit_norm: bool = False
    batch: int = 256
    exact: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Similarities:
    """HSIC of pairs of models as sums over each unit's positions, float64 [U, P, Q], and `counts` [U] of positions.

    `exact`: CKA [P, Q] over all positions at once, of the same pairs, where it was asked for.
    """

    sums: dict[Pair, Array]
    counts: Array
    exact: dict[Pair, Array]

    def sample(self, pair: Pair, draws: int = 2000, seed: int = 0) -> Sample:
        """CKA [P, Q] of the batches, and its draws [R, P, Q] of units, the same ones for every pair.

        To first order: CKA + sum_u (w_u - 1) psi_u / sum_u w_u c_u, w_u how often unit u was drawn and psi_u its share
        in CKA's derivative. HSIC is quadratic in the weights, so that draws of its own linear form can be negative.
        """
        xy_UPQ, xx_UP, yy_UQ = self.sums[pair], *(_diagonal(self.sums[one, one]) for one in pair)
        xy, xx, yy = (means(part, self.counts) for part in (xy_UPQ, xx_UP, yy_UQ))
        value = cka(xy, xx, yy)
        with np.errstate(invalid="ignore", divide="ignore"):
            own_UPQ = (xx_UP / xx)[:, :, None] + (yy_UQ / yy)[:, None, :]
            psi_UPQ = xy_UPQ / np.sqrt(xx[:, None] * yy) - value / 2 * own_UPQ
        return Sample(value, value + resampled_means(psi_UPQ, self.counts, draws, seed))

    def largest_share(self) -> float:
        """The most that the contributions of one unit are of any layer's HSIC(X, X): a single outlier can be it all."""
        own = [_diagonal(sums_UPQ) for (one, other), sums_UPQ in self.sums.items() if one == other]
        return float(np.nanmax([np.nanmax(sums_UP / sums_UP.sum(0)) for sums_UP in own]))


def compare(
    models: Sequence[Transformer],
    pairs: Iterable[Pair],
    positions: Positions,
    reading: Reading,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Similarities:
    """Read all models at the positions, in the same batches, and sum up the pairs; (a, a) comes for every model used.

    `advance` hears how many positions were compared. Raises UserError: no such stream, too few positions.
    """
    for model in models:
        check_stream(model, reading.point, reading.stream)
    pairs = list(pairs)
    used = sorted({one for pair in pairs for one in pair})
    pairs = list(dict.fromkeys([*((one, one) for one in used), *pairs]))
    widths = sum(models[one].config.num_layers * models[one].config.hidden_size for one in used)
    sums: dict[Pair, Array] = {}
    streaming = {pair: StreamingHsic() for pair in pairs} if reading.exact else {}
    for batches in shuffled_batches(positions, reading.batch, _STATES // widths, reading.seed):
        together = np.concatenate(batches)
        states = {one: read_states(models[one], positions, together, reading.point, reading.stream) for one in used}
        if reading.unit_norm:
            states = {one: F.normalize(x_LnD, dim=2) for one, x_LnD in states.items()}
        start = 0
        for batch in batches:
            part = {one: x_LnD[:, start : start + len(batch)] for one, x_LnD in states.items()}
            start += len(batch)
            for pair in pairs:
                _add(sums, pair, contributions(part[pair[0]], part[pair[1]]), positions.unit_N[batch], positions.units)
                if reading.exact:
                    streaming[pair].add(part[pair[0]], part[pair[1]])
            advance(len(batch))
    counts = np.bincount(positions.unit_N, minlength=positions.units).astype(np.float64)
    values = {pair: found.value().cpu().numpy() for pair, found in streaming.items()}
    exact = {pair: cka(hsic, *(np.diagonal(values[one, one]) for one in pair)) for pair, hsic in values.items()}
    return Similarities(sums, counts, exact)


def _add(sums: dict[Pair, Array], pair: Pair, found_NPQ: Tensor, unit_N: np.ndarray, units: int) -> None:
    total = sums.setdefault(pair, np.zeros((units, *found_NPQ.shape[1:])))
    np.add.at(total, unit_N, found_NPQ.cpu().numpy())


def _diagonal(sums_UPP: Array) -> Array:
    return np.ascontiguousarray(np.diagonal(sums_UPP, axis1=1, axis2=2))
