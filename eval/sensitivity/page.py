"""Figures and page of the sensitivity analysis: what tasks keep, and what the loss gains, when memory is changed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, INK, MUTED, applied
from eval.bootstrap import Interval
from eval.sensitivity.memory_loss import MAX_COUNTED, LossChange
from eval.sensitivity.retained import Condition, Retained

Columns = dict[str, list[Any]]
# For each condition and run (`ALL`: all of them together), the change over all targets and by bins.
Losses = Sequence[tuple[Condition, str, Sequence[LossChange]]]

_COLOURS = {"knowledge": COLOURS[1], "reading": COLOURS[0], "other": COLOURS[4]}
ALL = "all"

READING = (
    "Retained: the score with the memory changed, divided by the score with the memory as it is. The adjusted ratio "
    "takes off what guessing scores from both. Where the score with memory is within two standard errors of chance, "
    "there is nothing to lose and no ratio is shown."
)
PITFALLS = (
    "The model was trained with its memory: switched off, it also meets states that it has never seen. So a loss of "
    "score says that the model depends on its memory, not that memory added this much. `mean` gives every n-gram the "
    "same rows, and `shuffled` rows of the usual size that belong to other n-grams: what a task loses under one change "
    "alone may be the change's own harm. The authors of the paper read only the two ends of their figure."
)
LOSS = (
    "Rise of the validation loss, over all targets and by how often training had seen the longest n-gram that memory "
    "reads before the target. Where it never had, shorter n-grams and rows shared with others still answer. Of longer "
    f"trainings, the first {MAX_COUNTED:,} tokens are counted."
)


def retained_columns(found: Sequence[Retained]) -> Columns:
    """Retained scores as a table."""
    names = ("task", "kind", "on", "off", "chance", "items", "runs")
    columns: Columns = {"condition": [one.condition.label for one in found]}
    columns |= {name: [getattr(one, name) for one in found] for name in names}
    for name, title in (("ratio", "retained"), ("adjusted", "adjusted")):
        columns |= _interval_columns(title, [getattr(one, name) for one in found])
    return columns


def loss_columns(losses: Losses) -> Columns:
    """Changes of the loss as a table: nats per token, and bits per byte."""
    rows = [(condition, run, one) for condition, run, changes in losses for one in changes]
    columns: Columns = {
        "condition": [condition.label for condition, _, _ in rows],
        "run": [run for _, run, _ in rows],
        "bin": [one.bin for _, _, one in rows],
    }
    columns |= {name: [getattr(one, name) for _, _, one in rows] for name in ("on", "off", "documents", "targets")}
    columns |= _interval_columns("rise", [one.rise for _, _, one in rows])
    return columns | _interval_columns("rise_bits_per_byte", [one.rise_bits for _, _, one in rows])


def retained_figure(found: Sequence[Retained], folder: Path) -> SavedFigure:
    """Bars of one condition, the task that keeps least at the bottom; diamonds are adjusted for chance."""
    ranked = sorted(found, key=lambda one: np.inf if one.ratio is None else -one.ratio.mean)
    with applied():
        figure, (axis,) = new_figure(height=1.2 + 0.3 * len(ranked))
        axis.axvline(100, color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1, zorder=3)
        for place, one in enumerate(ranked):
            if one.ratio is None or one.adjusted is None:
                axis.text(1, place, "not above chance with memory on", va="center", fontsize=8, color=MUTED[0])
                continue
            axis.barh(place, 100 * one.ratio.mean, height=0.62, color=_COLOURS[one.kind])
            _whisker(axis, place, one.ratio, 100)
            axis.plot(100 * one.adjusted.mean, place, marker="D", markersize=4, color=INK[0], fillstyle="none")
        axis.set_yticks(range(len(ranked)), [one.task.replace("_", " ") for one in ranked])
        axis.set_ylim(len(ranked) - 0.5, -0.5)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.set_xlabel("score kept (%)")
        axis.grid(axis="y", visible=False)
        axis.set_title(found[0].condition.label)
        kinds = [kind for kind in _COLOURS if any(one.kind == kind for one in found)]
        axis.legend(
            handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds],
            loc="lower left",
            bbox_to_anchor=(0.35, 1.0),
            ncols=len(kinds),
        )
        return save(figure, retained_columns(ranked), folder, f"retained_{slug(found[0].condition.label)}")


def loss_figure(losses: Losses, folder: Path) -> SavedFigure:
    """Rise of the loss: of each condition over all targets, and by bins of frequency of the first one."""
    whole = [(condition.label, changes[0]) for condition, run, changes in losses if run == ALL]
    bins = next(changes for _, run, changes in losses if run == ALL)[1:]
    with applied():
        figure, axes = new_figure(1, 2, height=1.1 + 0.3 * max(len(whole), len(bins)))
        for axis, rows, colour in (
            (axes[0], whole, COLOURS[0]),
            (axes[1], [(one.bin, one) for one in bins], COLOURS[2]),
        ):
            for place, (_, one) in enumerate(rows):
                axis.barh(place, one.rise.mean, height=0.62, color=colour)
                _whisker(axis, place, one.rise, 1)
            axis.set_yticks(range(len(rows)), [label for label, _ in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.axvline(0, color=MUTED[0], linewidth=1)
            axis.grid(axis="y", visible=False)
            axis.set_xlabel("rise of the loss (nats per token)")
        axes[0].set_title("all targets")
        axes[1].set_title("by times seen in training")
        return save(figure, loss_columns(losses), folder, "loss")


def build_page(
    subtitle: str, retained: Sequence[Sequence[Retained]], losses: Losses, folder: Path, level: float
) -> Page:
    """Figures are written into `folder`; `retained` has one list for each condition."""
    page = Page("Sensitivity to memory", subtitle)
    page.text(PITFALLS)
    page.note(
        f"Intervals at {level:.0%}: 2,000 bootstrap draws of items or documents, the same with memory on and off; with "
        "several runs, the spread between them is in it."
    )
    if retained:
        page.section("Tasks", READING)
        for found in retained:
            page.figure(
                retained_figure(found, folder),
                "Bars: score kept, with intervals; diamonds: adjusted for chance; dashed: nothing lost. ",
            )
        flat = [one for found in retained for one in found]
        header = ["", "task", "with memory", "changed", "chance", "retained", "adjusted", "items"]
        page.table(header, [_row(one) for one in flat])
    if losses:
        page.section("Loss", LOSS)
        page.figure(loss_figure(losses, folder), f"Bars: mean rise, with intervals; right: {losses[0][0].label}. ")
        header = ["", "run", "targets", "count", "with memory", "changed", "rise, nats / token", "rise, bits / byte"]
        page.table(
            header,
            [
                [condition.label, run, one.bin, f"{one.targets:,}", f"{one.on:.4f}", f"{one.off:.4f}"]
                + [_text(one.rise), _text(one.rise_bits)]
                for condition, run, changes in losses
                for one in changes
            ],
        )
    return page


def slug(text: str) -> str:
    """A file's name of a condition's label."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _row(one: Retained) -> list[object]:
    scores = [f"{value:.3f}" for value in (one.on, one.off, one.chance)]
    return [one.condition.label, one.task, *scores, _text(one.ratio), _text(one.adjusted), one.items]


def _text(found: Interval | None) -> str:
    return "–" if found is None else f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def _interval_columns(name: str, found: Sequence[Interval | None]) -> Columns:
    return {
        name: [None if one is None else one.mean for one in found],
        f"{name}_low": [None if one is None else one.low for one in found],
        f"{name}_high": [None if one is None else one.high for one in found],
    }


def _whisker(axis: Any, place: float, found: Interval, scale: float) -> None:
    axis.plot(
        [scale * found.low, scale * found.high], [place, place], color=INK[0], linewidth=1.1, solid_capstyle="butt"
    )
