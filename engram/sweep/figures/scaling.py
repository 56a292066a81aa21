"""Loss over the rows of n-gram tables, with both laws, the model without tables, and the paper's points beside it."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from engram.report.figure import SavedFigure, save
from engram.report.style import MUTED, applied
from engram.sweep.figures.drawing import (
    RUN_COLUMNS,
    Data,
    colour,
    draw_baseline,
    draw_diverged,
    draw_points,
    headroom,
    legend_below,
    panels,
    set_title,
)
from engram.sweep.spec import file_name
from engram.sweep.views.points import Losses
from engram.sweep.views.scaling import Growth, ScalingView
from engram.sweep.views.spread import Spread, spread

_LAWS: dict[str, Any] = {"log-linear": "-", "power law": (0, (1, 1.5))}


def scaling_figure(view: ScalingView, folder: Path) -> SavedFigure:
    """One colour for each curve: means with intervals, seeds as dots, a line for each of the two laws."""
    data = Data("source", "curve", "kind", "rows", *RUN_COLUMNS)
    with applied():
        figure, axes, _ = panels(2 if view.paper else 1, height=3.0)
        _draw(axes[0], "ours", view.curves, view.baseline, data)
        axes[0].set_xlabel("rows of all n-gram tables")
        axes[0].set_ylabel("validation loss (nats per token)")
        set_title(axes[0], view.title)
        if view.paper:
            growth, baseline = view.paper
            _draw(axes[1], "paper", growth, np.array([baseline]), data)
            axes[1].set_xlabel("slots")
            set_title(axes[1], "; ".join(f"paper, {curve.name}: {curve.slope}" for curve in growth[:1]))
        lines = [
            Line2D([], [], color=MUTED[0], linestyle=style, linewidth=1.2, label=kind) for kind, style in _LAWS.items()
        ]
        legend_below(axes, lines)
        return save(figure, data.columns, folder, file_name(view.name))


def _draw(axis: Axes, source: str, curves: tuple[Growth, ...], baseline: Losses | None, data: Data) -> None:
    drawn = [curve for curve in curves if curve.points.finished]
    if not drawn:
        axis.set(xticks=[], yticks=[])
        return
    seeds = drawn[0].points.seeds
    floor = np.full(len(seeds), np.nan) if baseline is None else baseline
    measured = spread(np.concatenate([*(curve.points.loss for curve in drawn), floor[None]]))
    start = 0
    for index, curve in enumerate(drawn):
        part = slice(start, start + len(curve.rows))
        start += len(curve.rows)
        shown = Spread(measured.losses[part], measured.mean[part], measured.half[part])
        tint = colour(index)
        draw_points(axis, curve.rows, shown, tint, label=curve.name)
        grid = np.geomspace(min(curve.rows), max(curve.rows), 101)
        for kind, losses in curve.laws(grid).items():
            axis.plot(grid, losses, linestyle=_LAWS[kind], color=tint, linewidth=1.2, zorder=2)
            for rows, loss in zip(grid, losses, strict=True):
                data.add(source=source, curve=curve.name, kind=kind, rows=rows, loss=loss)
        draw_diverged(axis, curve.rows, curve.points)
        measured_at = {"source": source, "curve": curve.name, "kind": "measured"}
        data.add_runs(curve.points, shown, [{**measured_at, "rows": rows} for rows in curve.rows])
    axis.set_xscale("log")
    draw_baseline(axis, measured.losses[-1], "no table")
    for seed, loss in zip(seeds, floor, strict=True):
        data.add(source=source, curve="no table", kind="measured", rows=0, seed=seed, loss=loss)
    headroom(axis)
