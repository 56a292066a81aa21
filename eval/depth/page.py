"""Figures and page of effective depth: measures side by side, each with what it says and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, MUTED, applied
from eval.bootstrap import Interval
from eval.depth.contributions import PARTS, Depth
from eval.depth.shift import SCALAR, Shift
from eval.depth.tables import CENTRES, keys_of
from eval.lens.page import UNEQUAL, depth_axis, draw_band, draw_side, same_depth
from eval.lens.tables import SHARES, Curves, Settings
from eval.lens.threshold_depth import SCALARS
from eval.over_runs import Sample, over_runs
from eval.sided_table import ALL, picked, side_names
from eval.sides import Run, of_side

Columns = dict[str, list[Any]]

MEASURES = {
    "Lens": (
        "How far the prediction read at a depth is from the final one, as a share of the embedding's distance. It "
        "falls early where predictions are composed early. Each model is its own yardstick: flatter final predictions "
        "are easier to be near to. Depths count whole blocks, so what a memory adds at the head of a block counts "
        "with that block, as its open circle shows."
    ),
    "Alignment": (
        "Which block of the baseline a block is most alike, less the same number for the baseline against itself. "
        "Top-k means are pulled from the first and last blocks towards the middle, which the null takes off. It "
        "compares representations, not what the model does with them, and repeated tokens make early blocks alike."
    ),
    "Skipped blocks": (
        "How far the prediction moves when a block returns what it read. Deep blocks that can be skipped at little "
        "cost only polish the prediction. The other blocks never saw such states in training, and two blocks that do "
        "the same work hide each other."
    ),
    "Contributions": (
        "The size of what a block or a part adds, relative to what it reads. Streams grow with depth, so equal "
        "additions get smaller shares, and a large addition may serve no prediction. With hyper-connections it "
        "includes what the connection mixes between streams."
    ),
}
SHIFT = "mean over the blocks of the alignment less that of its null"
NO_SHIFT = "not measured"
CAUTION = (
    "These measures answer different questions and need not agree. A claim that memory deepens a model should hold in "
    "several of them, over seeds, and against a baseline of equal parameters and FLOPs."
)


@dataclass(frozen=True)
class Found:
    """What was measured on all runs; `shift` None: `without_shift` tells why."""

    runs: list[Run]
    curves: Curves
    depths: list[Depth]
    samples: list[Sample]
    shift: Shift | None
    without_shift: str = ""


def build_page(
    found: Found, scalar_table: Columns, block_table: Columns, settings: Settings, texts: str, out: Path
) -> Page:
    """The figures `measures` and `contributions` are written into `out`."""
    sides = side_names(found.runs)
    page = Page("Effective depth", f"{' and '.join(sides)}; {texts}")
    page.text(CAUTION)
    seeds = " and runs" if len(found.runs) > len(sides) else "; one run of each model says nothing about other seeds"
    bands = f"Bands: {settings.level:.0%} intervals over documents{seeds}. "
    page.figure(measures_figure(found, settings, out), bands)
    if not same_depth(found.runs):
        page.note(UNEQUAL)
    for name, text in MEASURES.items():
        page.heading(name)
        page.text(text)
        if name == "Alignment":
            page.note(found.shift.described if found.shift else f"Not measured: {found.without_shift}")
    page.section(
        "Depth in numbers",
        "; ".join(f"{name}: {text}" for name, text in {**SCALARS, **CENTRES, SCALAR: SHIFT}.items()) + ".",
    )
    keys = ("model", "run", "scalar", "unit", "mean", "low", "high", "resolved")
    body = [[_text(cell) for cell in row] for row in zip(*(scalar_table[key] for key in keys), strict=True)]
    page.table(keys, [row for row in body if row[1] == ALL], f"tau = {settings.tau:g} nats")
    page.section("Parts and later blocks")
    page.figure(
        contributions_figure(found, settings, block_table, out),
        "Left and middle: size and cosine to the streams of what each part adds. Right: how much the contributions of "
        "all later blocks change, on average, when a block is skipped. ",
    )
    return page


def measures_figure(found: Found, settings: Settings, out: Path) -> SavedFigure:
    """The four measures; the table behind it holds what is drawn."""
    runs = found.runs
    table: Columns = {name: [] for name in ("measure", "model", "depth", "mean", "low", "high")}
    with applied():
        figure, (lens, alignment, skipped, size) = new_figure(2, 2, height=5.2)
        for colour, side in zip(COLOURS, side_names(runs), strict=False):
            look = dict(color=colour)
            draw_side(lens, runs, found.curves, side, SHARES[0], settings.level, look, side)
            for axis, measure in ((skipped, "skipped_kl"), (size, "size")):
                band = block_band(found, side, measure, settings.level)
                x = block_places(found, side)
                draw_band(axis, x, band, look, side)
                _extend(table, measure, side, x, band)
        lens.axhline(0.5, color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1)
        lens.set_title("Lens")
        lens.set_ylabel("KL(place || final), share")
        skipped.set_title("Skipped blocks")
        skipped.set_ylabel("KL(whole || without) (nats)")
        skipped.set_ylim(bottom=0)
        size.set_title("Contributions")
        size.set_ylabel("|added| / |read|")
        size.set_ylim(bottom=0)
        alignment.set_title("Alignment")
        alignment.set_ylabel("a - null (blocks)")
        alignment.axhline(0, color=MUTED[0], linewidth=1)
        if found.shift is None:
            alignment.set_yticks([])
            alignment.text(0.5, 0.6, NO_SHIFT, transform=alignment.transAxes, ha="center", color=MUTED[0])
        else:
            band = found.shift.by_block
            x = block_places(found, side_names(runs)[0])
            draw_band(alignment, x, band, dict(color=COLOURS[0]), side_names(runs)[0])
            _extend(table, SCALAR, found.shift.side, x, band)
        depth_axis(lens, runs)
        for axis in (alignment, skipped, size):
            block_axis(axis, runs)
        for axis in (lens, skipped, size):
            axis.legend()
        return save(figure, table, out, "measures")


def contributions_figure(found: Found, settings: Settings, table: Columns, out: Path) -> SavedFigure:
    """Sizes and cosines of the parts, and changes of later blocks."""
    dashes = dict(zip(PARTS, ("-", "none", "--", ":"), strict=True))
    with applied():
        figure, axes = new_figure(1, 3, height=3.2)
        for colour, side in zip(COLOURS, side_names(found.runs), strict=False):
            depth = found.depths[of_side(found.runs, side)[0]]
            for axis, measure in zip(axes, ("size", "cosine"), strict=False):
                for part, dash in dashes.items():
                    if part == "block" or not any(one.name == part for one in depth.parts):
                        continue
                    band = block_band(found, side, measure, settings.level, part)
                    x = [place for place, one in _places_of(found, side, part)]
                    label = f"{side}, {part}"
                    axis.plot(
                        x,
                        band.mean,
                        color=colour,
                        linestyle=dash,
                        marker="D" if dash == "none" else "o",
                        markersize=3,
                        label=label,
                    )
            change, x = later_change(found, side, settings.level), block_places(found, side)[:-1]
            draw_band(axes[2], x, change, dict(color=colour), side)
        for axis, label in zip(axes, ("|added| / |read|", "cosine", "change of later blocks"), strict=True):
            axis.set_ylabel(label)
            block_axis(axis, found.runs)
        axes[0].set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return save(figure, table, out, "depth")


def block_band(found: Found, side: str, measure: str, level: float, part: str = "block") -> Interval:
    """A side's interval of one measure over its blocks."""
    keys = keys_of(found.depths[of_side(found.runs, side)[0]])
    chosen = [index for index, key in enumerate(keys) if key[:2] == (measure, part)]
    return over_runs([picked(found.samples[index], chosen) for index in of_side(found.runs, side)], level)


def later_change(found: Found, side: str, level: float) -> Interval:
    """Mean over the later blocks of their contributions' change, for each block that can be skipped before another."""
    keys = keys_of(found.depths[of_side(found.runs, side)[0]])
    groups = [
        [index for index, key in enumerate(keys) if key[0] == "change" and key[2] == layer]
        for layer in range(found.runs[of_side(found.runs, side)[0]].num_layers - 1)
    ]
    samples = []
    for index in of_side(found.runs, side):
        sample = found.samples[index]
        value = np.array([sample.value[group].mean() for group in groups])
        samples.append(Sample(value, np.stack([sample.draws[:, group].mean(1) for group in groups], -1)))
    return over_runs(samples, level)


def block_places(found: Found, side: str) -> list[float]:
    """Where a side's blocks are drawn."""
    return [place for place, _ in _places_of(found, side, "block")]


def block_axis(axis: Axes, runs: Sequence[Run]) -> None:
    if same_depth(runs):
        axis.set_xlabel("block")
        axis.set_xticks(range(0, runs[0].num_layers, max(1, runs[0].num_layers // 8)))
    else:
        axis.set_xlabel("block (share of all blocks)")


def _places_of(found: Found, side: str, part: str) -> list[tuple[float, int]]:
    index = of_side(found.runs, side)[0]
    scale = 1 if same_depth(found.runs) else found.runs[index].num_layers
    return [(one.layer / scale, one.layer) for one in found.depths[index].parts if one.name == part]


def _extend(table: Columns, measure: str, side: str, x: Sequence[float], band: Interval) -> None:
    table["measure"] += [measure] * len(x)
    table["model"] += [side] * len(x)
    table["depth"] += list(x)
    for name in ("mean", "low", "high"):
        table[name] += [None if np.isnan(end) else end for end in getattr(band, name).tolist()]


def _text(cell: object) -> str:
    return "–" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
