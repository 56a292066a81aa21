"""Whether marked tokens score higher than matched others: area under the ROC curve within bins, drawn over documents.

Legend: N tokens, S series of scores, D documents, P marked tokens of one bin, C its controls, R bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.bootstrap import draw_counts

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# About 128 MB of comparisons.
_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Auc:
    """P(marked > control) + P(equal) / 2 over pairs of the same bin, with a percentile interval; NaN without a pair."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 0.5:
            return "higher"
        return "lower" if self.high < 0.5 else "not resolved"


def matched_auc(
    scores_SN: npt.NDArray[np.floating],
    marked_N: Bools,
    control_N: Bools,
    bin_N: Ints,
    document_N: Ints,
    *,
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> list[Auc]:
    """One AUC for each series. Documents are drawn with replacement, the same draws for all series.

    A pair of tokens counts as often as the product of how often their two documents were drawn, so that pairs within
    and between documents both carry the documents' spread. Draws without a single pair are left out.
    """
    num_documents = int(document_N.max()) + 1 if len(document_N) else 0
    groups = [
        (np.flatnonzero(marked_N & (bin_N == place)), np.flatnonzero(control_N & (bin_N == place)))
        for place in np.unique(bin_N[marked_N])
    ]
    groups = [(marked, control) for marked, control in groups if len(control)]
    if not groups:
        return [Auc(np.nan, np.nan, np.nan)] * len(scores_SN)
    pairs_DD = np.zeros((num_documents, num_documents))
    for marked, control in groups:
        pairs_DD += np.outer(*(np.bincount(document_N[part], minlength=num_documents) for part in (marked, control)))
    if np.count_nonzero(pairs_DD.any(0) | pairs_DD.any(1)) < 2:
        # One document tells no spread.
        wins = (_wins(scores_N, groups, document_N, num_documents).sum() for scores_N in scores_SN)
        return [Auc(float(won / pairs_DD.sum()), np.nan, np.nan) for won in wins]
    weights_RD = np.concatenate(list(draw_counts(num_documents, draws, seed)))
    pairs_R = np.einsum("rd,rd->r", weights_RD @ pairs_DD, weights_RD)
    drawn = pairs_R > 0
    found = []
    for scores_N in scores_SN:
        wins_DD = _wins(scores_N, groups, document_N, num_documents)
        auc_R = np.einsum("rd,rd->r", weights_RD @ wins_DD, weights_RD)[drawn] / pairs_R[drawn]
        low, high = np.quantile(auc_R, [(1 - level) / 2, (1 + level) / 2])
        found.append(Auc(float(wins_DD.sum() / pairs_DD.sum()), float(low), float(high)))
    return found


def octave(position_N: Ints) -> Ints:
    """Bins of positions that double: 0 | 1, 2 | 3 to 6 | 7 to 14 | ..."""
    return np.floor(np.log2(position_N + 1)).astype(np.int64)


def _wins(
    scores_N: npt.NDArray[np.floating], groups: Sequence[tuple[Ints, Ints]], document_N: Ints, num_documents: int
) -> Floats:
    """Pairs that the marked token wins, a half for equal scores, by the documents of marked token and control."""
    wins_DD = np.zeros((num_documents, num_documents))
    for marked, control in groups:
        documents, first = np.unique(document_N[control], return_index=True)
        step = max(1, _PAIRS_AT_ONCE // len(control))
        for start in range(0, len(marked), step):
            some = marked[start : start + step]
            mine_P1, others_C = scores_N[some][:, None], scores_N[control]
            wins_PC = (mine_P1 > others_C) + 0.5 * (mine_P1 == others_C)
            # Tokens stand in the order of their documents.
            rows_PD = np.zeros((len(some), num_documents))
            rows_PD[:, documents] = np.add.reduceat(wins_PC, first, axis=1)
            np.add.at(wins_DD, document_N[some], rows_PD)
    return wins_DD
