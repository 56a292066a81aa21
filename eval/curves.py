"""Figures of a run's `metrics.jsonl`, each with the table behind it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.style import COLOURS, MUTED, applied

Metrics = Sequence[Mapping[str, Any]]

# layer_01/gate_mean_0: layer, statistic, and the stream if there is one for each.
_STATISTIC = re.compile(r"layer_(\d+)/(.+?)(?:_(\d+))?")
_DASHES = ("-", "--", ":", "-.")
_PANELS_PER_ROW = 3


def loss_figure(runs: Mapping[str, Metrics], levels: Mapping[str, float], folder: Path) -> SavedFigure:
    """Training and validation loss over tokens of each run, and `levels` (n-gram models) as dashed lines."""
    with applied():
        figure, (axis,) = new_figure(height=3.4)
        for index, (name, metrics) in enumerate(runs.items()):
            train_colour, colour = (COLOURS[0], COLOURS[1]) if len(runs) == 1 else (_colour(index), _colour(index))
            label = "" if len(runs) == 1 else f"{name}: "
            train, validation = _series(metrics, "loss"), _series(metrics, "val_loss")
            axis.plot(
                *train, color=train_colour, linewidth=0.9, alpha=0.55, label=f"{label}training" if train[0] else None
            )
            axis.plot(*validation, color=colour, marker="o", markersize=3.5, label=f"{label}validation")
        for level_name, level in levels.items():
            axis.axhline(level, color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1)
            axis.annotate(
                f"{level_name} {level:.2f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2.5),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=MUTED[0],
            )
        _token_axis(axis)
        axis.set_ylabel("loss (nats per token)")
        axis.legend(loc="upper right", bbox_to_anchor=(1, 1), ncols=1 if len(runs) < 4 else 2)
        table = _table(runs, ["loss", "val_loss"])
        for level_name, level in levels.items():
            _append(table, level_name, None, None, "n-gram model", level)
        return save(figure, table, folder, "loss")


def schedule_figure(runs: Mapping[str, Metrics], folder: Path) -> SavedFigure:
    """Learning rate, gradient norm and speed over tokens."""
    panels = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
    with applied():
        figure, axes = new_figure(1, len(panels), height=2.2)
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            for index, (name, metrics) in enumerate(runs.items()):
                axis.plot(*_series(metrics, key), color=_colour(index), linewidth=1.2, label=name)
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            _token_axis(axis)
            axis.yaxis.set_major_formatter(
                EngFormatter(sep="") if key == "tokens_per_second" else axis.yaxis.get_major_formatter()
            )
        if len(runs) > 1:
            axes[0].legend()
        return save(figure, _table(runs, list(panels)), folder, "schedule")


def statistics_figure(metrics: Metrics, folder: Path, name: str) -> SavedFigure | None:
    """Every statistic on a panel of its own, a colour per layer, a dash per stream; None where none were recorded."""
    panels: dict[str, list[tuple[int, int, str]]] = {}
    for match in filter(None, map(_STATISTIC.fullmatch, dict.fromkeys(key for line in metrics for key in line))):
        layer, statistic, stream = int(match[1]), match[2], int(match[3] or 0)
        panels.setdefault(statistic, []).append((layer, stream, match[0]))
    if not panels:
        return None
    titles = sorted(panels)
    layers = sorted({layer for lines in panels.values() for layer, _, _ in lines})
    rows = -(-len(panels) // _PANELS_PER_ROW)
    with applied():
        figure, axes = new_figure(rows, _PANELS_PER_ROW, height=0.4 + 1.75 * rows)
        for axis, title in zip(axes, titles, strict=False):
            for layer, stream, key in sorted(panels[title]):
                style = _DASHES[stream % len(_DASHES)]
                axis.plot(*_series(metrics, key), style, color=_colour(layers.index(layer)), linewidth=1.2)
            axis.set_title(title.replace("_", " "), fontsize=8)
            _token_axis(axis, label=False)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles = [Line2D([], [], color=_colour(index)) for index in range(len(layers))]
        figure.legend(handles, [f"layer {layer}" for layer in layers], loc="outside lower center", ncols=6)
        keys = [key for title in titles for _, _, key in sorted(panels[title])]
        return save(figure, _table({name: metrics}, keys), folder, f"statistics_{name}")


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Tokens and values of the lines that hold a number for `key`."""
    points = [(line["tokens"], line[key]) for line in metrics if isinstance(line.get(key), int | float)]
    return [tokens for tokens, _ in points], [value for _, value in points]


def _token_axis(axis: Axes, label: bool = True) -> None:
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if label:
        axis.set_xlabel("tokens")


def _table(runs: Mapping[str, Metrics], keys: Sequence[str]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {"run": [], "step": [], "tokens": [], "quantity": [], "value": []}
    for name, metrics in runs.items():
        for key in keys:
            for line in metrics:
                if isinstance(line.get(key), int | float):
                    _append(table, name, line["step"], line["tokens"], key, line[key])
    return table


def _append(table: dict[str, list[Any]], *row: Any) -> None:
    for column, value in zip(table.values(), row, strict=True):
        column.append(value)
