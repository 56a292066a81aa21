"""Differences from a reference as bars, with what the paper reports for the same change."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.style import COLOURS, INK, MUTED, PAPER, applied
from engram.report.text import counted
from engram.sweep.figures.drawing import Data, legend_below, set_title
from engram.sweep.paired import Difference
from engram.sweep.spec import file_name
from engram.sweep.views.bars import Bar, Bars
from engram.sweep.views.spread import LEVEL
from engram.sweep.words import capital, signed

_BETTER, _WORSE = COLOURS[0], COLOURS[1]


def bars_figure(view: Bars, folder: Path) -> SavedFigure:
    """Mean differences with intervals, in the order of the file; hatched where zero is not excluded."""
    data = Data("label", "reference", "seeds", "mean", "low", "high", "resolved", "paper")
    with applied():
        figure, (axis,) = new_figure(height=0.95 + 0.33 * max(len(view.bars), 1))
        for place, bar in enumerate(view.bars):
            found = bar.difference
            data.add(
                label=bar.label, reference=bar.reference, paper=bar.paper, **(_numbers(bar, found) if found else {})
            )
            if found is None:
                axis.text(0, place, " no finished run", va="center", fontsize=8, color=MUTED[0])
                continue
            lost = f", {counted(bar.diverged, 'run')} diverged" if bar.diverged else ""
            tint = _WORSE if found.mean > 0 else _BETTER
            style: dict[str, Any] = (
                {"color": tint} if bar.resolved else {"facecolor": PAPER[0], "edgecolor": tint, "hatch": "////"}
            )
            axis.barh(place, found.mean, height=0.62, linewidth=0.8, **style)
            if found.low is not None and found.high is not None:
                axis.plot([found.low, found.high], [place, place], color=INK[0], linewidth=1.1, solid_capstyle="butt")
            # Always to the right: the names stand on the left.
            axis.annotate(
                signed(found.mean) + ("" if bar.resolved else " not resolved") + lost,
                (max(0.0, found.mean, found.high or 0.0, bar.paper or 0.0), place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        reported = [(bar.paper, place) for place, bar in enumerate(view.bars) if bar.paper is not None]
        if reported:
            axis.plot(*zip(*reported, strict=True), "D", color=INK[0], markersize=4.5, mfc=PAPER[0], zorder=5)
        axis.axvline(0, color=INK[0], linewidth=0.9)
        axis.set_yticks(range(len(view.bars)), [bar.label for bar in view.bars])
        axis.set_ylim(len(view.bars) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.16)
        axis.set_xlabel(f"validation loss minus that of {view.reference} (nats per token)")
        set_title(axis, capital(view.says), share=0.85)
        _legend(axis, view)
        return save(figure, data.columns, folder, file_name(view.name))


def _numbers(bar: Bar, found: Difference) -> dict[str, float | bool | None]:
    return {
        "seeds": found.n,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "resolved": bar.resolved,
    }


def _legend(axis: Axes, view: Bars) -> None:
    handles: list[Patch | Line2D] = []
    if any(bar.resolved for bar in view.bars):
        handles += [Patch(color=_WORSE, label="worse"), Patch(color=_BETTER, label="better")]
    if any(not bar.resolved for bar, _ in view.measured):
        handles.append(Patch(facecolor=PAPER[0], edgecolor=MUTED[0], hatch="////", label="not resolved"))
    if any(found.low is not None for _, found in view.measured):
        handles.append(Line2D([], [], color=INK[0], linewidth=1.1, label=f"{LEVEL:.0%} interval"))
    if any(bar.paper is not None for bar in view.bars):
        handles.append(
            Line2D([], [], color=INK[0], marker="D", linestyle="", markersize=4.5, mfc=PAPER[0], label="paper")
        )
    legend_below([axis], handles)
