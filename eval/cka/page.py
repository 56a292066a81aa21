"""Figures and page of a comparison of layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, FULL_WIDTH, INK, MUTED, applied
from eval.bootstrap import Array, Interval
from eval.cka.tables import NULLS, Found, alignment_columns, matrix_columns, verdict
from eval.sided_table import shown

READING = (
    "Each cell is the similarity of what two layers hold about the same tokens (linear CKA, unbiased estimator): 1 for "
    "states that are equal up to rotation, scale and offset, 0 for independent ones. The dashed curve is the soft "
    "alignment a_j: the mean number of the baseline's layers most similar to layer j, weighted by similarity. Where it "
    "lies above the diagonal, layer j is like a deeper layer of the baseline. Layers are numbered from 1; the tables "
    "also hold numbers from 0."
)
PITFALLS = (
    "The alignment is bent at the edges: the first layers have no layers before them and the last ones none behind, so "
    "that even a model against itself has a_1 above 1, and the fewer layers, the more of the curve is edge. Read the "
    "difference to the null, which bends the same way, and not a_j alone. A few tokens of very large norm, or many "
    "entities that end in the same token, can make or hide a similarity; and similar states need not be used alike."
)
SHIFT = (
    "Above 0: the layer is like a deeper layer of the baseline than the null's layer is. argmax takes the most similar "
    "layer alone; dtw is the monotone path of dynamic time warping, whose ends are tied to the first and last layers. "
    "The baseline against itself is a lenient null, because nothing is as similar to a layer as that layer: where two "
    "runs of the baseline differ as much as model and baseline do, that is no property of the model."
)
# Above this share of a layer's HSIC with itself, one unit is worth a warning.
DOMINANT = 0.2
_HOW = {"soft": "soft alignment", "argmax": "most similar layer", "dtw": "dynamic time warping"}


def build_page(found: Found, folder: Path) -> Page:
    """The figures and tables `cka` and `alignment` are written into `folder`."""
    model, baseline = found.sides
    runs = len(found.matrices["model"])
    page = Page("Similarity of layers", f"{model} and {baseline}; {found.described}")
    page.text(READING)
    dotted = f"; dotted: a_j of {NULLS[found.main_null]}" if has_null(found) else ""
    page.figure(
        heat_figure(found, folder),
        f"Dashed: a_j of {model}{dotted}; thin: the diagonal. Negative estimates are drawn as 0. ",
    )
    page.text(PITFALLS)
    if found.undefined:
        page.note(
            f"{found.undefined:,} similarities are undefined: a layer's states do not differ between tokens, or the "
            "estimate of their spread is not positive. They weigh nothing in the alignment."
        )
    if found.largest_share > DOMINANT:
        page.note(_dominated(found))
    if np.isnan(found.aligned("soft").low).any():
        page.note("Where no interval is given, a layer is like no other in some of the draws: too few units decide.")
    least = min(found.matrix("model").mean.shape)
    if found.top_k >= least:
        page.note(
            f"k = {found.top_k} takes in all {least} layers: soft alignment then is a mean over a whole column, near "
            "the middle whatever the model. Take a smaller --top-k, or read the other two."
        )
    page.section("Alignment", SHIFT if has_null(found) else "Without a null, the edges' bias is part of every number.")
    about = "units of text and runs" if runs > 1 else "units of text; one pair of runs says nothing about other seeds"
    page.figure(alignment_figure(found, folder), f"Bands: {found.level:.0%} intervals over {about}. ")
    page.table(*_table(found), f"{found.level:.0%} intervals; k = {found.top_k}")
    return page


def has_null(found: Found) -> bool:
    return found.main_null in NULLS


def heat_figure(found: Found, folder: Path) -> SavedFigure:
    """CKA of the model's and the baseline's layers, and beside it of the null."""
    model, baseline = found.sides
    with applied():
        figure, axes = new_figure(1, 2 if has_null(found) else 1, width=FULL_WIDTH, height=3.1)
        _heat(figure, axes[0], found.matrix("model").mean)
        axes[0].plot(*_curve(found.aligned("soft")), color="white", linestyle="--", linewidth=1.6)
        axes[0].set_title(f"{model} and {baseline}")
        axes[0].set_xlabel(f"layer of {model}")
        axes[0].set_ylabel(f"layer of {baseline}")
        if has_null(found):
            null = found.null("soft", found.main_null)
            axes[0].plot(*_curve(null), color="white", linestyle=":", linewidth=1.6)
            _heat(figure, axes[1], found.matrix(found.main_null).mean)
            axes[1].plot(*_curve(null), color="white", linestyle=":", linewidth=1.6)
            axes[1].set_title(f"null: {NULLS[found.main_null]}")
            axes[1].set_xlabel(f"layer of {baseline}")
        return save(figure, matrix_columns(found), folder, "cka")


def alignment_figure(found: Found, folder: Path) -> SavedFigure:
    """a_j of the model and the nulls, and their differences."""
    with applied():
        figure, axes = new_figure(1, 2 if has_null(found) else 1)
        number = np.arange(1, found.aligned("soft").mean.size + 1)
        axes[0].plot(number, number, color=MUTED[0], linewidth=0.8)
        _band(axes[0], found.aligned("soft"), COLOURS[1], found.sides[0], "-")
        axes[0].set_ylabel(f"layer of {found.sides[1]} it is like")
        if has_null(found):
            for kind, style in zip(found.alignments["soft"], (":", "-"), strict=False):
                _band(axes[0], found.null("soft", kind), COLOURS[0], NULLS[kind], style)
            axes[1].axhline(0, color=MUTED[0], linewidth=1)
            for how, colour in zip(_HOW, (COLOURS[1], COLOURS[2], COLOURS[3]), strict=True):
                _band(axes[1], found.shift(how, found.main_null), colour, _HOW[how], "-")
            axes[1].set_ylabel("difference to the null (layers)")
        for axis in axes:
            axis.set_xlabel(f"layer of {found.sides[0]}")
            _ticks(axis, number.size, "x")
            axis.legend()
        return save(figure, alignment_columns(found), folder, "alignment")


def lines(found: Found) -> Iterator[str]:
    """What the terminal shows."""
    yield found.described
    if found.undefined:
        yield f"{found.undefined:,} similarities are undefined: a layer's states do not differ between positions"
    if found.largest_share > DOMINANT:
        yield _dominated(found)
    yield f"a_j, from layer 1: {' '.join(f'{value:.2f}' for value in found.aligned('soft').mean)}"
    for kind in found.alignments["soft"]:
        if kind in NULLS:
            shift = found.mean_shift("soft", kind)
            missing = " (no interval: a layer is like no other in some of the draws)" if np.isnan(shift.low) else ""
            one = Interval(*(np.atleast_1d(end) for end in (shift.mean, shift.low, shift.high)))
            yield f"less {NULLS[kind]}, mean over layers: {shown(one, 0)}, {verdict(shift)[0]}{missing}"


def _dominated(found: Found) -> str:
    return (
        f"A single entity or document makes {min(found.largest_share, 1):.0%} of a layer's spread: similarities "
        "are about it as much as about the rest. --unit-norm takes the states' sizes away"
    )


def _table(found: Found) -> tuple[list[str], list[list[object]]]:
    header = ["layer (from 1)", "a_j"]
    aligned = found.aligned("soft")
    body: list[list[object]] = [[j + 1, shown(aligned, j, 2)] for j in range(aligned.mean.size)]
    for kind in found.alignments["soft"] if has_null(found) else ():
        header += [f"null: {NULLS[kind]}", "difference", ""]
        null, shift = found.null("soft", kind), found.shift("soft", kind)
        words = verdict(shift)
        for j, row in enumerate(body):
            row += [shown(null, j, 2), shown(shift, j, 2), words[j]]
    return header, body


def _heat(figure: Figure, axis: Axes, matrix_PQ: Array) -> None:
    rows, columns = matrix_PQ.shape
    edges = np.arange(columns + 1) + 0.5, np.arange(rows + 1) + 0.5
    axis.set_facecolor(MUTED[0])
    mesh = axis.pcolormesh(*edges, np.ma.masked_invalid(matrix_PQ.clip(0, 1)), vmin=0, vmax=1, cmap="viridis")
    least = min(rows, columns)
    axis.plot([1, least], [1, least], color=INK[0], linewidth=0.8)
    axis.grid(visible=False)
    axis.set_aspect("equal")
    _ticks(axis, columns, "x")
    _ticks(axis, rows, "y")
    figure.colorbar(mesh, ax=axis, label="CKA", ticks=[0, 0.25, 0.5, 0.75, 1], fraction=0.046)


def _ticks(axis: Axes, layers: int, which: str) -> None:
    numbers = range(1, layers + 1, max(1, layers // 8))
    (axis.set_xticks if which == "x" else axis.set_yticks)(list(numbers))


def _curve(interval: Interval) -> tuple[Array, Array]:
    return np.arange(1.0, interval.mean.size + 1), interval.mean


def _band(axis: Axes, interval: Interval, colour: str, label: str, style: str) -> None:
    number, mean = _curve(interval)
    axis.plot(number, mean, marker="o", markersize=3, color=colour, linestyle=style, label=label)
    if not np.isnan(interval.low).all():
        axis.fill_between(number, interval.low, interval.high, color=colour, alpha=0.18, linewidth=0)
