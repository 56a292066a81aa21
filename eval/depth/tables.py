"""Tables of effective depth: what skipped blocks change and what parts contribute, with intervals and differences.

Legend: L blocks, K numbers of one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eval.bootstrap import Array, means, resampled_means
from eval.depth.contributions import Depth
from eval.lens.tables import Settings
from eval.over_runs import Sample
from eval.sided_table import compared, estimates, picked, rows, side_names
from eval.sides import Run, of_side

CENTRES = {
    "skipped_centre": "where skipping hurts: mean depth of the blocks, weighted by the divergence that skipping causes",
    "size_centre": "where the streams are changed: mean depth of the blocks, weighted by the size of what they add",
}
Key = tuple[str, str, int, int | None]


def keys_of(depth: Depth) -> list[Key]:
    """Measure, part, block and, for changes, the later block: what each number of `depth_sample` is."""
    layers = depth.skipped_kl.shape[1]
    found: list[Key] = [("size", part.name, part.layer, None) for part in depth.parts]
    found += [("cosine", part.name, part.layer, None) for part in depth.parts]
    found += [("skipped_kl", "block", layer, None) for layer in range(layers)]
    return found + [("change", "block", int(layer), int(later)) for layer, later in zip(*_later(layers), strict=True)]


def depth_sample(depth: Depth, settings: Settings) -> Sample:
    """All numbers of a run as one vector [K], with their draws of documents."""
    changes = depth.change[:, *_later(depth.skipped_kl.shape[1])]
    sums = np.concatenate([depth.size, depth.cosine, depth.skipped_kl, changes], axis=1)
    return Sample(means(sums, depth.counts), resampled_means(sums, depth.counts, settings.draws, settings.seed))


def block_rows(
    runs: Sequence[Run], found: Sequence[Depth], samples: Sequence[Sample], level: float
) -> Iterator[dict[str, Any]]:
    """One row for each run or side and number; differences of what both sides have, where they have as many blocks."""
    for side in side_names(runs):
        indices = of_side(runs, side)
        mine = [runs[index] for index in indices]
        named = [_named(key) for key in keys_of(found[indices[0]])]
        yield from rows(estimates(mine, [samples[index] for index in indices], level), mine, named)
    if len({run.num_layers for run in runs}) > 1:
        return
    every = [keys_of(depth) for depth in found]
    shared = [key for key in every[0] if all(key in keys for keys in every)]
    common = [picked(sample, [keys.index(key) for key in shared]) for sample, keys in zip(samples, every, strict=True)]
    if difference := compared(runs, common, level):
        yield from rows([difference], runs, [_named(key) for key in shared])


def centre_rows(
    runs: Sequence[Run], found: Sequence[Depth], samples: Sequence[Sample], settings: Settings
) -> Iterator[dict[str, Any]]:
    """CENTRES in blocks; between unequal models, as shares of the depth."""
    centres, shares = [], []
    for run, depth, sample in zip(runs, found, samples, strict=True):
        keys = keys_of(depth)
        chosen = [
            [index for index, key in enumerate(keys) if key[0] == name and key[1] == "block"]
            for name in ("skipped_kl", "size")
        ]
        one = Sample(
            np.stack([centre(sample.value[index]) for index in chosen], -1),
            np.stack([centre(sample.draws[:, index]) for index in chosen], -1),
        )
        centres.append(one)
        shares.append(Sample(one.value / run.num_layers, one.draws / run.num_layers))
    named: list[dict[str, Any]] = [{"scalar": name, "unit": "blocks"} for name in CENTRES]
    yield from rows(estimates(runs, centres, settings.level), runs, named)
    equal = len({run.num_layers for run in runs}) == 1
    if difference := compared(runs, centres if equal else shares, settings.level):
        yield from rows([difference], runs, named if equal else [key | {"unit": "share"} for key in named])


def centre(weights: Array) -> Array:
    """sum_l (l + 1/2) w_l / sum_l w_l over the last axis: L / 2 for equal weights; NaN where all are 0."""
    depths = np.arange(weights.shape[-1]) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(weights @ depths / weights.sum(-1))


def _later(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a skipped block and a later one."""
    return np.triu_indices(layers, k=1)


def _named(key: Key) -> dict[str, Any]:
    measure, part, layer, later = key
    return {"measure": measure, "part": part, "layer": layer, "later": later}
