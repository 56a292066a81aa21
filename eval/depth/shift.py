"""The alignment shift as a measure of depth: which block of the baseline each block is like, less that of a null."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.config import UserError
from engram.data.tokenizer import Tokenizer
from eval.bootstrap import Interval
from eval.cka.alignment import measure_alignment
from eval.entities import entity_positions, passages_of
from eval.lens.tables import Settings
from eval.loading import load
from eval.over_runs import Sample, over_runs
from eval.sided_table import Estimate, rows, side_names
from eval.sides import Run, Texts, of_side

SCALAR = "alignment_shift"


@dataclass(frozen=True)
class Shift:
    """a_j - null [J] of every block j of the first side, in blocks of the second, and its mean over the blocks."""

    side: str
    by_block: Interval
    mean: Interval
    described: str
    runs: int


def measure_shift(
    runs: Sequence[Run], texts: Texts, tokenizer: Tokenizer, settings: Settings, device: str, threads: int | None
) -> Shift:
    """The k-th run of the first side against the k-th of the second, at the last tokens of the texts' entities.

    The null is the baseline against its next seed, or against itself where it is alone; entities are drawn for the
    intervals. Up to three models are in memory at once. Raises UserError: one side, unequal numbers of blocks, texts
    with too few entities.
    """
    sides = side_names(runs)
    if len(sides) < 2:
        raise UserError("alignment needs a model to compare with: name it with --baseline")
    passages = passages_of(texts.documents, tokenizer)
    entities = entity_positions(passages, tokenizer, texts.length)
    mine, others = (of_side(runs, side) for side in sides)
    found = []
    for place, (run, baseline) in enumerate(zip(mine, others, strict=False)):
        chosen = [run, baseline] + ([others[(place + 1) % len(others)]] if len(others) > 1 else [])
        models = [load(runs[index].folder, device, "float32", threads).model for index in chosen]
        found.append(
            measure_alignment(
                models[0],
                models[1],
                entities.positions,
                other_baseline=models[2] if len(models) > 2 else None,
                draws=settings.draws,
                seed=settings.seed,
            )
        )
    null = "itself" if len(others) == 1 else "another seed of it"
    described = (
        f"{len(found)} of {len(mine)} runs, each against a run of {sides[1]}, at the last tokens of "
        f"{len(entities.chosen):,} entities; null: {sides[1]} against {null}"
    )
    shifts = [alignment.shift for alignment in found]
    means = [Sample(shift.value.mean(-1), shift.draws.mean(-1)) for shift in shifts]
    name = f"{sides[0]} - {sides[1]}"
    return Shift(name, over_runs(shifts, settings.level), over_runs(means, settings.level), described, len(found))


def shift_rows(shift: Shift, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """One row for each block, as in the tables of blocks."""
    keys = [{"measure": SCALAR, "part": "block", "layer": j, "later": None} for j in range(len(shift.by_block.mean))]
    yield from rows([Estimate(shift.side, None, shift.by_block, True, shift.runs)], runs, keys)


def shift_scalar_rows(shift: Shift, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The mean over blocks, as in the tables of scalars."""
    mean = Interval(*(np.atleast_1d(end) for end in (shift.mean.mean, shift.mean.low, shift.mean.high)))
    yield from rows([Estimate(shift.side, None, mean, True, shift.runs)], runs, [{"scalar": SCALAR, "unit": "blocks"}])
