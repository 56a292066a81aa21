"""Tables of LogitLens: curves with intervals over documents and runs, and what one number says about their depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.lens.logit_lens import METRICS, Lens
from eval.lens.threshold_depth import SCALARS, TAU, curve_sample, normalised, scalars
from eval.over_runs import Sample
from eval.sided_table import ALL, IN_THESE_RUNS, compared, estimates, picked, rows, side_names
from eval.sides import Run, of_side

DIRECTIONS = {"layer_to_final": "kl_layer_to_final", "final_to_layer": "kl_final_to_layer"}
# The divergences as shares of the embedding's stand behind the metrics that are measured.
SHARES = tuple(f"{name}_share" for name in DIRECTIONS.values())
_BLOCKS = ("depth_tau", "depth_half", "crossing_half")


@dataclass(frozen=True)
class Settings:
    """`direction` is plotted and gives the numbers of depth; `tuned_steps` 0: no tuned lens."""

    direction: str = "layer_to_final"
    tau: float = TAU
    streams: bool = False
    tuned_steps: int = 0
    tuned_tokens: int = 16_384
    data: str | None = None
    tokens: int = 100_000
    level: float = 0.9
    seed: int = 0
    draws: int = 2000


@dataclass(frozen=True)
class Curves:
    """One lens of all runs: the sums of each, and numbers [places, METRICS + SHARES] with their draws."""

    lens: str
    found: list[Lens]
    samples: list[Sample]


def sampled(lens: str, found: Sequence[Lens], settings: Settings) -> Curves:
    """Curves with their draws, all runs on the same draws of documents."""
    samples = []
    for one in found:
        curve = curve_sample(one, settings.draws, settings.seed)
        share = normalised(curve, [METRICS.index(name) for name in DIRECTIONS.values()])
        joined = (np.concatenate(pair, -1) for pair in ((curve.value, share.value), (curve.draws, share.draws)))
        samples.append(Sample(*joined))
    return Curves(lens, list(found), samples)


def curve_rows(runs: Sequence[Run], curves: Curves, level: float) -> Iterator[dict[str, Any]]:
    """One row for each run or side, place and metric; differences where both sides have as many blocks."""
    names = [*METRICS, *SHARES]
    for side in side_names(runs):
        indices = of_side(runs, side)

        keys = _place_keys(curves, indices[0], range(len(curves.found[indices[0]].places)), names)
        mine = [runs[index] for index in indices]
        yield from rows(estimates(mine, [_flat(curves.samples[index]) for index in indices], level), mine, keys)
    if len({run.num_layers for run in runs}) == 1:
        shared = [_flat(picked(sample, lens.curve)) for sample, lens in zip(curves.samples, curves.found, strict=True)]
        if difference := compared(runs, shared, level):
            yield from rows([difference], runs, _place_keys(curves, 0, curves.found[0].curve, names))


def scalar_rows(runs: Sequence[Run], curves: Curves, settings: Settings) -> Iterator[dict[str, Any]]:
    """SCALARS of every run, side and difference; depths of sides with unequal blocks differ as shares of the depth."""
    metric = METRICS.index(DIRECTIONS[settings.direction])
    samples, shares = [], []
    for run, sample, lens in zip(runs, curves.samples, curves.found, strict=True):
        curve = picked(sample, (lens.curve, metric))
        one = Sample(scalars(curve.value, settings.tau), scalars(curve.draws, settings.tau))
        divisor = np.array([run.num_layers if name in _BLOCKS else 1 for name in SCALARS])
        samples.append(one)
        shares.append(Sample(one.value / divisor, one.draws / divisor))
    common = {"lens": curves.lens, "direction": settings.direction, "tau": settings.tau}
    blocks = [common | {"scalar": name, "unit": "blocks" if name in _BLOCKS else "share"} for name in SCALARS]
    yield from rows(estimates(runs, samples, settings.level), runs, blocks)
    equal = len({run.num_layers for run in runs}) == 1
    if difference := compared(runs, samples if equal else shares, settings.level):
        yield from rows([difference], runs, blocks if equal else [key | {"unit": "share"} for key in blocks])


def lines(table: dict[str, list[Any]]) -> list[str]:
    """What the terminal shows: every side's numbers and the differences."""
    names = ("model", "run", "scalar", "unit", "mean", "low", "high", "resolved")
    kinds = table.get("lens", [""] * len(table["model"]))
    found = []
    for kind, *cells in zip(kinds, *(table[name] for name in names), strict=True):
        model, run, name, unit, mean, low, high, verdict = cells
        if run == ALL and mean is not None:
            ends = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            words = {"no": "  not resolved", IN_THESE_RUNS: f"  resolved {IN_THESE_RUNS} alone"}
            said = words.get(verdict, "")
            lens = f" ({kind} lens)" if kind else ""
            found.append(f"{model + lens:36}{name:16}{mean:.3f}{ends} {unit}{said}")
    return found


def _flat(sample: Sample) -> Sample:
    return Sample(sample.value.reshape(-1), sample.draws.reshape(len(sample.draws), -1))


def _place_keys(curves: Curves, index: int, chosen: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    lens = curves.found[index]
    depth = max(place.depth for place in lens.places)
    return [
        {
            "lens": curves.lens,
            "point": lens.places[place].name,
            "depth": lens.places[place].depth,
            "depth_fraction": lens.places[place].depth / depth,
            "stream": "merged" if lens.places[place].stream is None else lens.places[place].stream,
            "metric": name,
            "n_documents": len(lens.counts),
            "n_tokens": int(lens.counts.sum()),
        }
        for place in chosen
        for name in names
    ]
