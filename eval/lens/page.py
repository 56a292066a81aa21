"""Figures and page of LogitLens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, MUTED, applied
from eval.bootstrap import Interval
from eval.lens.logit_lens import METRICS
from eval.lens.tables import DIRECTIONS, SHARES, Curves, Settings
from eval.lens.threshold_depth import SCALARS
from eval.over_runs import Sample, over_runs
from eval.sided_table import ALL, picked, side_names
from eval.sides import Run, of_side

Columns = dict[str, list[Any]]

READING = (
    "At each depth the residual streams are read as if the model ended there: merged, normalised and put through the "
    "model's own head. A curve that falls earlier means predictions that are composed earlier. Place 0 is the "
    "embedding, place l stands behind l blocks; open circles stand right behind a memory, in the block that follows."
)
PITFALLS = (
    "Each model is compared with its own final distribution, so a model with flatter predictions has a smaller "
    "divergence for that reason alone: read the divergence as a share of the embedding's, the cross-entropy against "
    "the text and the agreement of the likeliest tokens beside it. Early states are not made for the head, which the "
    "tuned lens (one affine map for each place) corrects for; but what a map can read, the model need not use. No "
    "single number is the effective depth."
)
UNEQUAL = "The models have unequal numbers of blocks: depth is drawn, and depths are compared, as shares of all blocks."


def build_page(
    runs: Sequence[Run],
    found: Sequence[Curves],
    tables: tuple[Columns, Columns],
    settings: Settings,
    texts: str,
    out: Path,
) -> Page:
    """The figures and tables `logit_lens` and, for single streams, `streams` are written into `out`."""
    lens_table, scalar_table = tables
    sides = side_names(runs)
    page = Page("LogitLens", f"{' and '.join(sides)}; {texts}")
    page.text(READING)
    page.figure(
        lens_figure(runs, found, settings, lens_table, out),
        f"Bands: {settings.level:.0%} intervals over documents"
        + (" and runs" if len(runs) > len(sides) else "; one run of each model says nothing about other seeds")
        + ". ",
    )
    if not same_depth(runs):
        page.note(UNEQUAL)
    page.text(PITFALLS)
    if settings.streams:
        page.section("Single streams", "Each residual stream alone, through the same norm and head.")
        page.figure(streams_figure(runs, found[0], settings, out), "Against the final distribution of all streams. ")
    page.section("Depth in numbers", "; ".join(f"{name}: {text}" for name, text in SCALARS.items()) + ".")
    keys = ("model", "run", "lens", "scalar", "unit", "mean", "low", "high", "resolved")
    body = [[_text(cell) for cell in row] for row in zip(*(scalar_table[key] for key in keys), strict=True)]
    page.table(keys, [row for row in body if row[1] == ALL], f"tau = {settings.tau:g} nats, {settings.direction}")
    return page


def same_depth(runs: Sequence[Run]) -> bool:
    return len({run.num_layers for run in runs}) == 1


def lens_figure(
    runs: Sequence[Run], found: Sequence[Curves], settings: Settings, table: Columns, out: Path
) -> SavedFigure:
    """Divergence, its share of the embedding's, cross-entropy and agreement over depth; dotted: the tuned lens."""
    divergence = DIRECTIONS[settings.direction]
    order = "place || final" if settings.direction == "layer_to_final" else "final || place"
    panels = (
        (f"KL({order}) (nats)", {divergence: "-"}),
        ("KL, share of the embedding's", {SHARES[list(DIRECTIONS.values()).index(divergence)]: "-"}),
        ("nats", {"cross_entropy": "-", "entropy": "--"}),
        ("agreement with the final", {"top1_agreement": "-", "top5_agreement": "--"}),
    )
    with applied():
        figure, axes = new_figure(2, 2, height=5.2)
        for axis, (label, metrics) in zip(axes, panels, strict=True):
            for colour, side in zip(COLOURS, side_names(runs), strict=False):
                for metric, dash in metrics.items():
                    name = metric.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")
                    title = side if len(metrics) == 1 else f"{side}, {name.removesuffix(' agreement')}"
                    draw_side(
                        axis, runs, found[0], side, metric, settings.level, dict(color=colour, linestyle=dash), title
                    )
                    if len(found) > 1 and len(metrics) == 1:
                        look = dict(color=colour, linestyle=":")
                        draw_side(axis, runs, found[1], side, metric, settings.level, look, f"{side}, tuned")
            axis.set_ylabel(label)
            depth_axis(axis, runs)
            axis.legend()
        return save(figure, table, out, "logit_lens")


def streams_figure(runs: Sequence[Run], curves: Curves, settings: Settings, out: Path) -> SavedFigure:
    """The divergence of each stream alone, one panel for each model."""
    metric = DIRECTIONS[settings.direction]
    sides = side_names(runs)
    columns: Columns = {name: [] for name in ("model", "stream", "depth", "mean", "low", "high")}
    with applied():
        figure, axes = new_figure(1, len(sides))
        for axis, side in zip(axes, sides, strict=True):
            draw_side(axis, runs, curves, side, metric, settings.level, dict(color=MUTED[0], linestyle="--"), "merged")
            lens = curves.found[of_side(runs, side)[0]]
            streams = dict.fromkeys(place.stream for place in lens.places if place.stream is not None)
            for colour, stream in zip(COLOURS * len(streams), streams, strict=False):
                chosen = [
                    index
                    for index, place in enumerate(lens.places)
                    if place.stream == stream and place.point != "resid_memory"
                ]
                band = side_band(runs, curves, side, chosen, metric, settings.level)
                depths = list(range(len(chosen)))
                draw_band(axis, depths, band, dict(color=colour), f"stream {stream}")
                columns["model"] += [side] * len(chosen)
                columns["stream"] += [stream] * len(chosen)
                columns["depth"] += depths
                for name in ("mean", "low", "high"):
                    columns[name] += getattr(band, name).tolist()
            axis.set_title(side)
            axis.set_xlabel("depth (blocks)")
            axis.legend()
        axes[0].set_ylabel("KL (nats)")
        return save(figure, columns, out, "streams")


def draw_side(
    axis: Axes,
    runs: Sequence[Run],
    curves: Curves,
    side: str,
    metric: str,
    level: float,
    look: dict[str, Any],
    label: str,
) -> None:
    """A side's curve with its band, and an open circle behind each memory, joined to the place before it."""
    lens = curves.found[of_side(runs, side)[0]]
    scale = 1 if same_depth(runs) else len(lens.curve) - 1
    band = side_band(runs, curves, side, lens.curve, metric, level)
    draw_band(axis, [depth / scale for depth in range(len(lens.curve))], band, look, label)
    memories = [index for index, place in enumerate(lens.places) if place.stream is None and not place.on_curve]
    if memories:
        behind = side_band(runs, curves, side, memories, metric, level).mean
        for index, value in zip(memories, behind, strict=True):
            depth = lens.places[index].depth
            x = depth / scale
            axis.plot([x, x], [band.mean[depth], value], color=look["color"], linewidth=0.8, linestyle=":")
            axis.plot(x, value, marker="o", markersize=4.5, fillstyle="none", color=look["color"], linestyle="none")


def draw_band(axis: Axes, x: Sequence[float], band: Interval, look: dict[str, Any], label: str) -> None:
    axis.plot(x, band.mean, marker="o", markersize=3, label=label, **look)
    if not np.isnan(band.low).all():
        axis.fill_between(x, band.low, band.high, color=look["color"], alpha=0.18, linewidth=0)


def side_band(
    runs: Sequence[Run], curves: Curves, side: str, chosen: Sequence[int], metric: str, level: float
) -> Interval:
    """The side's interval of a metric at the chosen places."""
    column = [*METRICS, *SHARES].index(metric)
    samples: list[Sample] = [picked(curves.samples[index], (chosen, column)) for index in of_side(runs, side)]
    return over_runs(samples, level)


def depth_axis(axis: Axes, runs: Sequence[Run]) -> None:
    if same_depth(runs):
        axis.set_xlabel("depth (blocks)")
        axis.set_xticks(range(0, runs[0].num_layers + 1, max(1, runs[0].num_layers // 8)))
    else:
        axis.set_xlabel("depth (share of all blocks)")


def _text(cell: object) -> str:
    return "–" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
