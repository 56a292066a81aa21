"""What the drawings of a study have in common."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation, Transform

from engram.report.figure import new_figure
from engram.report.style import COLOURS, MUTED
from engram.sweep.views.points import Losses, Points
from engram.sweep.views.spread import Spread

NATS = "validation loss (nats per token)"
# Seeds stand this many points beside their mean.
_BESIDE = 5.0
# Entries of a legend beside each other.
_ABREAST = 5
# Of a title's size, in a full figure's width.
_LETTERS = 78


class Data:
    """The numbers behind a figure, in long form: `columns` grows a row at a time."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, **row: Any) -> None:
        """A row; what it leaves out, and what is not finite, is an empty cell."""
        assert row.keys() <= self.columns.keys()
        for name, column in self.columns.items():
            value = row.get(name)
            if isinstance(value, np.generic):
                value = value.item()
            column.append(None if isinstance(value, float) and not np.isfinite(value) else value)

    def add_runs(self, points: Points, shown: Spread, places: Sequence[dict[str, Any]]) -> None:
        """A row for each point, at its own of `places`, and each seed: as measured, and as `shown`."""
        for index, place in enumerate(places):
            for position, seed in enumerate(points.seeds):
                self.add(
                    **place,
                    mean=shown.mean[index],
                    half_interval=shown.half[index],
                    seed=seed,
                    loss=points.loss[index, position],
                    loss_without_seed_level=shown.losses[index, position],
                )


# What `Data.add_runs` fills.
RUN_COLUMNS = ("seed", "loss", "mean", "half_interval", "loss_without_seed_level")


def panels(count: int, *, columns: int = 2, height: float = 2.6) -> tuple[Figure, list[Axes], list[Axes]]:
    """A figure of `count` panels, at most `columns` side by side; the axes that are left over are switched off."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, height=0.45 + height * rows)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count], axes[count:]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def draw_points(
    axis: Axes, x: Sequence[float], measured: Spread, colour: str, *, label: str = "", aside: float = 0.0
) -> None:
    """Means with their intervals, and seeds as pale dots; `aside` points to the right of their place."""
    seeds = measured.losses.shape[1]
    if seeds > 1:
        places = np.repeat(np.asarray(x, dtype=float)[:, None], seeds, axis=1)
        axis.plot(
            places.ravel(),
            measured.losses.ravel(),
            ".",
            color=colour,
            alpha=0.5,
            markersize=4.5,
            markeredgewidth=0,
            transform=moved(axis, aside + (0 if aside else _BESIDE)),
            zorder=3,
        )
    means = axis.errorbar(
        x,
        measured.mean,
        yerr=np.nan_to_num(measured.half) if np.isfinite(measured.half).any() else None,
        fmt="o",
        color=colour,
        markersize=4,
        elinewidth=1.2,
        label=label or None,
        transform=moved(axis, aside),
        zorder=4,
    )
    # Data in a moved frame do not count for the limits, and these are no further out than the means.
    assert means is not None
    ends = np.concatenate([measured.losses.ravel(), measured.mean - np.nan_to_num(measured.half)])
    ends = np.concatenate([ends, measured.mean + np.nan_to_num(measured.half)])
    ends = ends[np.isfinite(ends)]
    if len(ends):
        axis.update_datalim([(min(x), ends.min()), (max(x), ends.max())])
        axis.autoscale_view()


def moved(axis: Axes, points: float) -> Transform:
    figure = axis.get_figure()
    assert figure is not None
    return axis.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def single(losses: Losses) -> Spread:
    """One run for each point."""
    return Spread(losses[:, None], losses, np.full(len(losses), np.nan))


def set_title(axis: Axes, text: str, share: float = 1.0) -> None:
    """A finding above its panel, broken into lines that fit this share of the panel's width."""
    place = axis.get_subplotspec()
    columns = place.get_gridspec().ncols if place else 1
    axis.set_title(textwrap.fill(text, int(share * _LETTERS / columns)))


def draw_baseline(axis: Axes, losses: Losses, text: str) -> None:
    """Mean of `losses[seeds]` as a dashed line over the panel's width, and its seeds' range as a band."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return
    if len(finite) > 1:
        axis.axhspan(finite.min(), finite.max(), color=MUTED[0], alpha=0.12, linewidth=0, zorder=0.5)
    axis.axhline(finite.mean(), color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axis.annotate(
        text,
        (1, finite.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2.5),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=MUTED[0],
        zorder=5,
    )


def draw_diverged(axis: Axes, x: Sequence[float], points: Points) -> None:
    """How many runs diverged, from the panel's top down; the points' means leave these out."""
    height: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "top", "transform": axis.get_xaxis_transform()}
    for place, count in zip(x, points.diverged, strict=True):
        if count:
            text = f"{count} of {len(points.seeds)} diverged"
            axis.text(place, 0.98, text, fontsize=7.5, color=MUTED[0], **height)


def legend_below(axes: Sequence[Axes], handles: Sequence[Artist] = ()) -> None:
    """One legend for all panels, under them, where it covers no data: of what has a label in any, then `handles`."""
    figure = axes[0].get_figure()
    assert figure is not None
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown |= {str(handle.get_label()): handle for handle in handles}
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), _ABREAST))


def headroom(axis: Axes, share: float = 0.06) -> None:
    """Some room above and below what is drawn."""
    low, high = axis.get_ylim()
    axis.set_ylim(low - share * (high - low), high + share * (high - low))
