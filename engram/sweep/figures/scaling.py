"""Loss over the rows of n-gram tables, with both laws, the model without tables, and the paper's points beside it."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from engram.report.figure import SavedFigure, save
from engram.report.style import applied
from engram.sweep.figures.drawing import (
    Data,
    colour,
    draw_baseline,
    draw_points,
    file_name,
    headroom,
    panels,
    set_title,
)
from engram.sweep.views.points import Losses
from engram.sweep.views.scaling import Growth, ScalingView, paper_growth
from engram.sweep.views.spread import Spread, spread


def scaling_figure(view: ScalingView, folder: Path) -> SavedFigure:
    """One colour for each curve: means with intervals, seeds as dots, the preferred law solid, the other one dotted."""
    data = Data("source", "curve", "kind", "rows", "seed", "loss", "mean", "half_interval", "loss_without_seed_level")
    with applied():
        figure, axes, _ = panels(2, height=3.0)
        _draw(axes[0], "ours", view.curves, view.baseline, data)
        axes[0].set_xlabel("rows of all n-gram tables")
        axes[0].set_ylabel("validation loss (nats per token)")
        set_title(axes[0], view.title)
        growth, baseline = paper_growth()
        _draw(axes[1], "paper", growth, np.array([baseline]), data)
        axes[1].set_xlabel("slots")
        set_title(axes[1], "; ".join(f"paper, {curve.name}: {curve.slope}" for curve in growth[:1]))
        return save(figure, data.columns, folder, file_name(view.name))


def _draw(axis: Axes, source: str, curves: tuple[Growth, ...], baseline: Losses | None, data: Data) -> None:
    drawn = [curve for curve in curves if curve.points.finished]
    if not drawn:
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
            solid = kind == curve.law
            axis.plot(grid, losses, linestyle="-" if solid else (0, (1, 1.5)), color=tint, linewidth=1.2, zorder=2)
            for rows, loss in zip(grid, losses, strict=True):
                data.add(source=source, curve=curve.name, kind=kind, rows=rows, loss=loss)
        for place, rows in enumerate(curve.rows):
            for position, seed in enumerate(curve.points.seeds):
                data.add(
                    source=source,
                    curve=curve.name,
                    kind="measured",
                    rows=rows,
                    seed=seed,
                    loss=curve.points.loss[place, position],
                    mean=shown.mean[place],
                    half_interval=shown.half[place],
                    loss_without_seed_level=shown.losses[place, position],
                )
    axis.set_xscale("log")
    draw_baseline(axis, measured.losses[-1], "no table")
    for seed, loss in zip(seeds, floor, strict=True):
        data.add(source=source, curve="no table", kind="measured", rows=0, seed=seed, loss=loss)
    headroom(axis)
    if len(drawn) > 1:
        axis.legend(loc="best")
