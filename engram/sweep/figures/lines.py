"""Loss along one axis of a study, a line for each combination of the others."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from engram.report.figure import SavedFigure, save
from engram.report.style import applied
from engram.sweep import paper
from engram.sweep.figures.drawing import (
    NATS,
    RUN_COLUMNS,
    Data,
    colour,
    draw_baseline,
    draw_diverged,
    draw_points,
    headroom,
    legend_below,
    moved,
    panels,
    set_title,
    single,
)
from engram.sweep.spec import file_name
from engram.sweep.views.lines import Contest, Line, Lines
from engram.sweep.views.spread import Spread, spread
from engram.sweep.words import capital

# Points between lines at the same place.
_DODGE = 6.0


def lines_figure(view: Lines, folder: Path) -> SavedFigure:
    """Means with intervals and seeds as dots; the reference dashed, with the range of its seeds."""
    data = Data("line", "value", "x", *RUN_COLUMNS)
    beside = 0 if view.paper is None else 1
    with applied():
        figure, axes, _ = panels(len(view.contests) + beside, height=2.6)
        order = [line for contest in view.contests for line in contest.lines]
        for axis, contest in zip(axes, view.contests, strict=False):
            _draw(axis, view, contest, order, data)
        axes[0].set_ylabel(NATS)
        if view.paper is not None:
            _draw_paper(axes[-1], view.paper, data)
        legend_below(axes)
        if view.baseline is not None:
            for seed, loss in zip(view.points.seeds, view.baseline, strict=True):
                data.add(line=f"reference: {view.reference}", seed=seed, loss=loss)
        return save(figure, data.columns, folder, file_name(view.name))


def _draw(axis: Axes, view: Lines, contest: Contest, order: list[Line], data: Data) -> None:
    losses = np.concatenate([line.points.loss for line in contest.lines])
    baseline = np.full((1, losses.shape[1]), np.nan) if view.baseline is None else view.baseline[None]
    # Seeds' levels are taken from all points of the panel together.
    measured = spread(np.concatenate([losses, baseline]))
    start, several = 0, len(contest.lines) > 1
    for position, line in enumerate(contest.lines):
        part = slice(start, start + len(line.x))
        start += len(line.x)
        shown = Spread(measured.losses[part], measured.mean[part], measured.half[part])
        tint, aside = colour(order.index(line)), _DODGE * (position - (len(contest.lines) - 1) / 2)
        axis.plot(line.x, shown.mean, color=tint, linewidth=1.1, alpha=0.6, transform=moved(axis, aside))
        draw_points(axis, line.x, shown, tint, label=line.name if several else "", aside=aside)
        draw_diverged(axis, line.x, line.points)
        places = zip(line.x, line.ticks, strict=True)
        data.add_runs(line.points, shown, [{"line": line.name, "value": tick, "x": x} for x, tick in places])
    if view.reference is not None:
        draw_baseline(axis, measured.losses[-1], view.reference)
    x = sorted({value for line in contest.lines for value in line.x})
    ticks = {value: tick for line in contest.lines for value, tick in zip(line.x, line.ticks, strict=True)}
    if view.numeric and len(x) > 2 and x[0] > 0 and _geometric(x):
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(x, [ticks[value] for value in x])
    axis.margins(x=0.08)
    axis.set_xlabel(view.axis)
    headroom(axis)
    alone = len(view.contests) > 1 and contest.lines[0].name
    set_title(axis, f"{alone}: {contest.says}" if alone else capital(contest.says))


def _draw_paper(axis: Axes, curve: paper.Curve, data: Data) -> None:
    x, losses = curve
    axis.plot(x, losses, color=colour(1), linewidth=1.1, alpha=0.6)
    draw_points(axis, list(x), single(losses), colour(1))
    draw_baseline(axis, np.array([paper.memory_scaling()["baseline"]]), "no memory")
    best = int(np.argmin(losses))
    set_title(axis, f"paper: lowest at layer {x[best]:g} of {len(x)} (one seed)")
    axis.set_xlabel("layer")
    headroom(axis)
    for place, loss in zip(x, losses, strict=True):
        data.add(line="paper", value=f"{place:g}", x=place, loss=loss)


def _geometric(x: list[float]) -> bool:
    """Whether steps are more even as ratios than as differences."""
    return float(np.std(np.diff(np.log(x)))) / np.ptp(np.log(x)) < float(np.std(np.diff(x))) / np.ptp(x)
