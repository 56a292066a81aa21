"""The allocation curve: loss over the experts' share, one panel for each budget, the paper's beside them."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from engram.report.figure import SavedFigure, save
from engram.report.style import COLOURS, MUTED, applied
from engram.sweep.figures.drawing import (
    RUN_COLUMNS,
    Data,
    colour,
    draw_diverged,
    draw_points,
    headroom,
    legend_below,
    panels,
    set_title,
)
from engram.sweep.spec import file_name
from engram.sweep.views.allocation import AllocationView, Curve
from engram.sweep.views.spread import LEVEL, spread

_LOSS = "validation loss (nats)"
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 1.5))
_SHARE = "experts' share ρ of the inactive parameters"


def allocation_figure(view: AllocationView, folder: Path) -> SavedFigure:
    """Seeds as dots, means with intervals, both fits, the band of the minimum's place, and the pure-experts line."""
    data = Data("curve", "kind", "rho", *RUN_COLUMNS)
    ours = [curve for curve in view.curves if curve.points.finished]
    with applied():
        figure, axes, _ = panels(len(ours) + len(view.paper), height=2.55)
        for index, (axis, curve) in enumerate(zip(axes, ours, strict=False)):
            _draw(axis, curve, colour(index), data)
        for axis, curve in zip(axes[len(ours) :], view.paper, strict=True):
            _draw(axis, curve, MUTED[0], data)
        # Shares can be compared across panels.
        low = min(axis.get_xlim()[0] for axis in axes)
        for index, axis in enumerate(axes):
            axis.set_xlim(low, 1.05)
            if index % 2 == 0:
                axis.set_ylabel(_LOSS)
            if index >= len(axes) - 2:
                axis.set_xlabel(_SHARE)
        legend_below(axes, _handles())
        return save(figure, data.columns, folder, file_name(view.name))


def _draw(axis: Axes, curve: Curve, tint: str, data: Data) -> None:
    measured = spread(curve.points.loss)
    draw_points(axis, curve.rho, measured, tint)
    draw_diverged(axis, curve.rho, curve.points)
    data.add_runs(curve.points, measured, [{"curve": curve.name, "kind": "measured", "rho": rho} for rho in curve.rho])
    limits = axis.get_ylim()
    grid = np.linspace(min(curve.rho), max(curve.rho), 201)
    if curve.judged is not None:
        fits = {"two-term": curve.judged.curve.predict(grid), "parabola": curve.judged.parabola.predict(grid)}
        axis.plot(grid, fits["two-term"], color=tint, linewidth=1.4, zorder=2)
        axis.plot(grid, fits["parabola"], color=tint, linewidth=1.0, linestyle=_DASHED, zorder=2)
        for kind, losses in fits.items():
            for rho, loss in zip(grid, losses, strict=True):
                data.add(curve=curve.name, kind=kind, rho=rho, loss=loss)
        if curve.band is not None or curve.judged.seeds == 1:
            axis.axvline(curve.judged.argmin, color=COLOURS[4], linewidth=1.2, zorder=0.8)
    if curve.band is not None:
        axis.axvspan(*curve.band, color=COLOURS[4], alpha=0.22, linewidth=0, zorder=0.5)
    if curve.pure is not None and np.isfinite(measured.mean[curve.pure]):
        axis.axhline(measured.mean[curve.pure], color=MUTED[0], linestyle=_DOTTED, linewidth=1.1, zorder=1)
    # A parabola may leave the panel: the measured points decide what it shows.
    axis.set_ylim(limits)
    headroom(axis)
    set_title(axis, f"{curve.name}: {curve.title}" if curve.name else curve.title)


def _handles() -> list[Line2D | Patch]:
    ink = MUTED[0]
    return [
        Line2D([], [], color=ink, linewidth=1.4, label="two-term fit"),
        Line2D([], [], color=ink, linewidth=1.0, linestyle=_DASHED, label="parabola"),
        Line2D([], [], color=ink, linewidth=1.1, linestyle=_DOTTED, label="experts only"),
        Line2D([], [], color=COLOURS[4], linewidth=1.2, label="minimum"),
        Patch(color=COLOURS[4], alpha=0.22, label=f"its {LEVEL:.0%} interval"),
    ]
