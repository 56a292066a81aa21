"""Tables of a comparison of layers: the matrices, and each layer's alignment.

Legend: P layers of the baseline, Q of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import Array, Interval
from eval.cka.alignment import Alignment
from eval.over_runs import Sample, over_runs
from eval.sided_table import columns

Columns = dict[str, list[Any]]

NULLS = {"self": "the baseline against itself", "seeds": "the baseline against its next seed"}


@dataclass(frozen=True)
class Found:
    """Everything that was measured, one sample for each pair of runs.

    `matrices`: CKA [P, Q] of the `model`, and of the nulls `self` and `seeds` as far as there are any; `exact`: its
    mean over pairs at all positions at once; `alignments`: by way of alignment and kind of null. `undefined` counts
    similarities that are NaN; `largest_share` is what one unit adds to a layer's HSIC with itself at most.
    """

    sides: tuple[str, str]
    matrices: dict[str, list[Sample]]
    exact: dict[str, Array]
    alignments: dict[str, dict[str, list[Alignment]]]
    undefined: int
    largest_share: float
    level: float
    top_k: int
    described: str

    @property
    def main_null(self) -> str:
        """Another seed where there is one: it holds what two runs of one recipe differ by."""
        return list(self.alignments["soft"])[-1]

    def matrix(self, kind: str) -> Interval:
        return over_runs(self.matrices[kind], self.level)

    def aligned(self, how: str) -> Interval:
        """Layers [Q] that the model's are like, from 1."""
        return self._over(self.alignments[how][self.main_null], "aligned")

    def null(self, how: str, kind: str) -> Interval:
        return self._over(self.alignments[how][kind], "null")

    def shift(self, how: str, kind: str) -> Interval:
        return self._over(self.alignments[how][kind], "shift")

    def mean_shift(self, how: str, kind: str) -> Interval:
        return self._over(self.alignments[how][kind], "mean_shift")

    def _over(self, found: Sequence[Alignment], name: str) -> Interval:
        return over_runs([getattr(one, name) for one in found], self.level)


def verdict(interval: Interval) -> list[str]:
    """What a difference of layers says, one word for each."""
    low, high = np.atleast_1d(interval.low), np.atleast_1d(interval.high)
    return np.where(low > 0, "deeper", np.where(high < 0, "shallower", "not resolved")).tolist()


def matrix_columns(found: Found) -> Columns:
    """One row for each matrix and pair of layers; `layer` counts from 0, `layer_number` from 1."""
    table = []
    for kind, samples in found.matrices.items():
        interval = found.matrix(kind)
        for (row, column), mean in np.ndenumerate(interval.mean):
            place = {"matrix": kind, "layer": column, "layer_number": column + 1}
            place |= {"baseline_layer": row, "baseline_layer_number": row + 1}
            numbers = {"cka": float(mean)}
            numbers |= {"low": float(interval.low[row, column]), "high": float(interval.high[row, column])}
            numbers |= {"exact": float(found.exact[kind][row, column])} if found.exact else {}
            table.append({**place, **_cells(numbers), "runs": len(samples)})
    return columns(table)


def alignment_columns(found: Found) -> Columns:
    """One row for each way of alignment, quantity and layer; the mean over layers has no layer.

    `aligned` and `null` are numbers of layers from 1, `shift` their difference.
    """
    table = []
    for how, by_null in found.alignments.items():
        table += _rows(how, "aligned", "", found.aligned(how))
        for kind in by_null:
            if kind in NULLS:
                table += _rows(how, "null", kind, found.null(how, kind))
                table += _rows(how, "shift", kind, found.shift(how, kind))
                table += _rows(how, "mean_shift", kind, found.mean_shift(how, kind))
    return columns(table)


def _rows(how: str, quantity: str, null: str, interval: Interval) -> list[dict[str, Any]]:
    words = verdict(interval) if quantity.endswith("shift") else [None] * interval.mean.size
    ends = (np.atleast_1d(end).tolist() for end in (interval.mean, interval.low, interval.high))
    table = []
    for layer, (mean, low, high, word) in enumerate(zip(*ends, words, strict=True)):
        place = {"layer": layer, "layer_number": layer + 1} if interval.mean.ndim else {"layer": None}
        named = {"how": how, "quantity": quantity, "null": null, "layer": None, "layer_number": None, **place}
        table.append({**named, **_cells({"mean": mean, "low": low, "high": high}), "verdict": word})
    return table


def _cells(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(number) else number for name, number in numbers.items()}
