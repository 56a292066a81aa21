"""Figures of the facts: recall against exposures, and accuracy of every set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.style import COLOURS, INK, MUTED, applied
from eval.facts.questions import SETS
from eval.facts.tables import Row, columns_of

# The sets whose groups are exposures, as far as a curve of them says something.
RECALL = ("local_fact", "far_fact", "paraphrase", "two_hop")
_CHANCE = (0, (4, 3))


def recall_figure(rows: Sequence[Row], chance: float, folder: Path) -> SavedFigure | None:
    """Accuracy against the times that a fact is stated, one curve for each recipe; None where no such set was asked."""
    chosen = [row for row in rows if row.task in RECALL and row.metric == "accuracy"]
    tasks = [task for task in RECALL if any(row.task == task for row in chosen)]
    if not tasks:
        return None
    with applied():
        figure, axes = new_figure((len(tasks) + 1) // 2, min(2, len(tasks)), height=2.5 * ((len(tasks) + 1) // 2))
        for axis, task in zip(axes, tasks, strict=False):
            for place, recipe in enumerate(dict.fromkeys(row.recipe for row in chosen)):
                curve = [row for row in chosen if row.task == task and row.recipe == recipe]
                _curve(axis, curve, COLOURS[place % len(COLOURS)])
            _chance(axis, chance)
            axis.set_xscale("log", base=2)
            axis.set_ylim(-0.03, 1.03)
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("times stated in training")
            axis.set_ylabel("accuracy")
        for axis in axes[len(tasks) :]:
            axis.set_visible(False)
        axes[0].legend(loc="upper left")
        return save(figure, columns_of(chosen, chance), folder, "recall")


def sets_figure(rows: Sequence[Row], chance: float, folder: Path) -> SavedFigure:
    """Bars of the accuracy on every set, side by side for each recipe."""
    chosen = [row for row in rows if row.metric == "accuracy"]
    tasks = [task for task in SETS if any(row.task == task for row in chosen)]
    recipes = list(dict.fromkeys(row.recipe for row in chosen))
    width = 0.8 / len(recipes)
    with applied():
        figure, (axis,) = new_figure(height=3.1)
        for place, recipe in enumerate(recipes):
            found = {row.task: row.interval for row in chosen if row.recipe == recipe}
            x = np.arange(len(tasks)) + (place - (len(recipes) - 1) / 2) * width
            colour = COLOURS[place % len(COLOURS)]
            axis.bar(x, [found[task].mean for task in tasks], 0.92 * width, color=colour, label=recipe)
            axis.vlines(
                x, [found[task].low for task in tasks], [found[task].high for task in tasks], color=INK[0], lw=1
            )
        _chance(axis, chance)
        axis.set_xticks(np.arange(len(tasks)), [task.replace("_", "\n") for task in tasks])
        axis.set_ylim(0, 1.03)
        axis.set_ylabel("accuracy")
        axis.grid(axis="x", visible=False)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)
        return save(figure, columns_of(chosen, chance), folder, "sets")


def _curve(axis: Axes, curve: Sequence[Row], colour: str) -> None:
    x = [int(row.group) for row in curve]
    axis.plot(x, [row.interval.mean for row in curve], marker="o", markersize=3, color=colour, label=curve[0].recipe)
    low, high = ([float(getattr(row.interval, end)) for row in curve] for end in ("low", "high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _chance(axis: Axes, chance: float) -> None:
    axis.axhline(chance, color=MUTED[0], linestyle=_CHANCE, linewidth=1)
