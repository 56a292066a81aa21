"""RULER's figures and page: eight groups as bars, length by depth as a map, scores over lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, INK, LINE, MUTED, PAPER, applied
from eval.bootstrap import Interval
from eval.results import Item
from eval.ruler.measure import EXACT, LOGPROB, STRING_MATCH
from eval.ruler.sample import Sample
from eval.ruler.summary import (
    ALL,
    DEPTH_BINS,
    Scores,
    by_depth,
    collect,
    difference,
    effective_length,
    score_of,
)
from eval.ruler.tasks import GROUPS

READING = (
    "Score: the share of the expected answers that stand in the generated text, in any case (NVIDIA's string match; of "
    "aliases, any one). Tasks of a group weigh the same."
)
FORCED = (
    "Score: how often every token of the right answer is the likeliest after the tokens before it. Nothing was "
    "generated."
)
SYNTHETIC = (
    "Where the haystack is called synthetic, prose and questions come from our own templates: such numbers compare "
    "with each other, and with no published ones."
)
CONTINUOUS = (
    "Log-probability of the right answer, in nats per token, which moves long before answers become right, and how "
    "often greedy decoding would write it whole."
)


@dataclass(frozen=True)
class _Shown:
    """How a metric is written: its factor, digits and axis."""

    scale: float
    digits: int
    axis: str

    def text(self, found: Interval) -> str:
        mean, low, high = (self.scale * end for end in _ends(found))
        return f"{mean:.{self.digits}f} ({low:.{self.digits}f} to {high:.{self.digits}f})"


_SHOWN = {
    STRING_MATCH: _Shown(100, 1, "score (%)"),
    EXACT: _Shown(100, 1, "whole answer (%)"),
    LOGPROB: _Shown(1, 3, "log P(answer)\n(nats / token)"),
}


@dataclass(frozen=True)
class Answered:
    """One model and its items."""

    name: str
    folder: str
    step: int
    items: list[Item]


def headline(answered: Sequence[Answered]) -> str:
    """The metric that figures show: NVIDIA's, where texts were generated."""
    return STRING_MATCH if any(item.metric == STRING_MATCH for item in answered[0].items) else EXACT


def build_page(
    answered: Sequence[Answered],
    samples: Sequence[Sample],
    threshold: float,
    level: float,
    seed: int,
    folder: Path,
    note: str | None,
) -> Page:
    """Figures are written into `folder`; with two models, the page has the difference of the first less the second."""
    metric = headline(answered)
    scores = [collect(one.items, samples, metric) for one in answered]
    longest = scores[0].lengths[-1]
    count = len(next(iter(scores[0].values.values())))
    subtitle = "; ".join(f"{one.name}: {one.folder}, step {one.step:,}" for one in answered)
    page = Page("RULER", subtitle)
    page.text(READING if metric == STRING_MATCH else FORCED)
    if note:
        page.text(note)
    page.tiles(
        [
            (_percent(score_of(each, ALL, longest, level, seed).mean), f"{one.name}, all tasks at {longest:,} tokens")
            for one, each in zip(answered, scores, strict=True)
        ]
        + [
            (_length(effective_length(each, threshold)), f"{one.name}, longest length above {threshold:.1%}")
            for one, each in zip(answered, scores, strict=True)
        ]
    )
    page.note(
        f"{count} samples of each task and length. Intervals at {level:.0%}: 2,000 bootstrap draws of samples, the "
        "same for both models. A difference is resolved where its interval leaves zero out; the spread between seeds "
        "of training is not in it."
    )
    page.section("Groups")
    bars = bars_figure(answered, samples, (metric, LOGPROB), longest, level, seed, folder)
    page.figure(bars, f"Groups at {longest:,} tokens, with intervals. ")
    page.table(*_group_table(answered, samples, metric, level, seed))
    page.section("Lengths", "Mean over all tasks that were asked.")
    page.figure(
        length_figure(answered, scores, threshold, level, seed, folder), f"Dashed: the bar of {threshold:.1%}. "
    )
    if any(len(one.needle_depths) == 1 for one in samples):
        page.section("Depth", "Samples whose answer stands in one place, by length and by where that place is.")
        page.figure(depth_figure(answered, samples, metric, folder), "0 % is the start of the input. Grey: no sample. ")
    page.section("Teacher-forced", CONTINUOUS)
    page.table(*_group_table(answered, samples, LOGPROB, level, seed), caption="Nats per token of the answer.")
    if metric != EXACT:
        page.table(*_group_table(answered, samples, EXACT, level, seed), caption="Whole answers, in percent.")
    page.section("Tasks", SYNTHETIC)
    page.table(*_task_table(answered, samples, scores))
    return page


def terminal_lines(answered: Sequence[Answered], samples: Sequence[Sample], threshold: float) -> list[str]:
    """One line for each model and length."""
    metric = headline(answered)
    lines = []
    for one in answered:
        scores = collect(one.items, samples, metric)
        for length in scores.lengths:
            parts = [f"{group} {_percent(scores.units(group, length).mean())}" for group in scores.groups]
            lines.append(f"{one.name}, {length:,} tokens, {metric}: {', '.join(parts)}")
        lines.append(
            f"{one.name}: longest length above {threshold:.1%}: {_length(effective_length(scores, threshold))}"
        )
    return lines


def bars_figure(
    answered: Sequence[Answered],
    samples: Sequence[Sample],
    metrics: Sequence[str],
    length: int,
    level: float,
    seed: int,
    folder: Path,
) -> SavedFigure:
    """Groups side by side, a bar for each model, and a panel for each metric."""
    width = 0.8 / len(answered)
    data: dict[str, list[Any]] = {name: [] for name in ("metric", "model", "group", "length", "mean", "low", "high")}
    with applied():
        figure, axes = new_figure(len(metrics), 1, height=0.6 + 1.7 * len(metrics), share_x=True)
        for axis, metric in zip(axes, metrics, strict=True):
            shown = _SHOWN[metric]
            for index, one in enumerate(answered):
                scores = collect(one.items, samples, metric)
                groups = [group for group in scores.groups if group != ALL]
                for place, group in enumerate(groups):
                    mean, low, high = _ends(score_of(scores, group, length, level, seed))
                    x = place + (index - (len(answered) - 1) / 2) * width
                    axis.bar(x, shown.scale * mean, width * 0.92, color=COLOURS[index])
                    axis.plot([x, x], [shown.scale * low, shown.scale * high], color=INK[0], linewidth=1.1)
                    _append(data, metric, one.name, group, length, mean, low, high)
            axis.set_xticks(range(len(groups)), [_label(group) for group in groups], fontsize=7)
            if shown.scale == 100:
                axis.set_ylim(0, 102)
            axis.set_ylabel(shown.axis)
            axis.grid(axis="x", visible=False)
        handles = [Patch(color=COLOURS[index], label=one.name) for index, one in enumerate(answered)]
        axes[0].legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(answered))
        return save(figure, data, folder, "groups")


def length_figure(
    answered: Sequence[Answered], scores: Sequence[Scores], threshold: float, level: float, seed: int, folder: Path
) -> SavedFigure:
    """The mean over all tasks at each length."""
    data: dict[str, list[Any]] = {name: [] for name in ("model", "length", "mean", "low", "high")}
    with applied():
        figure, (axis,) = new_figure(height=2.5)
        axis.axhline(100 * threshold, color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1)
        for index, (one, each) in enumerate(zip(answered, scores, strict=True)):
            found = [_ends(score_of(each, ALL, length, level, seed)) for length in each.lengths]
            means, lows, highs = ([100 * value for value in ends] for ends in zip(*found, strict=True))
            axis.fill_between(each.lengths, lows, highs, color=COLOURS[index], alpha=0.15, linewidth=0)
            axis.plot(each.lengths, means, color=COLOURS[index], marker="o", markersize=4, label=one.name)
            for length, ends in zip(each.lengths, found, strict=True):
                _append(data, one.name, length, *ends)
        axis.set_xscale("log", base=2)
        axis.set_xticks(scores[0].lengths, [f"{length:,}" for length in scores[0].lengths])
        axis.minorticks_off()
        axis.set_ylim(0, 102)
        axis.set_xlabel("tokens")
        axis.set_ylabel("score (%)")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(answered))
        return save(figure, data, folder, "lengths")


def depth_figure(answered: Sequence[Answered], samples: Sequence[Sample], metric: str, folder: Path) -> SavedFigure:
    """A map for each model: length by depth."""
    data: dict[str, list[Any]] = {name: [] for name in ("model", "length", "depth_from", "score", "samples")}
    colours = LinearSegmentedColormap.from_list("score", [PAPER[0], COLOURS[0]]).with_extremes(bad=LINE[0])
    with applied():
        figure, axes = new_figure(1, len(answered), height=2.5)
        for axis, one in zip(axes, answered, strict=True):
            lengths, means_DL, counts_DL = by_depth(one.items, samples, metric)
            image = axis.imshow(100 * means_DL, vmin=0, vmax=100, cmap=colours, aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            step = 100 // DEPTH_BINS
            axis.set_yticks(range(DEPTH_BINS), [f"{step * i}–{step * (i + 1)}" for i in range(DEPTH_BINS)])
            axis.grid(visible=False)
            axis.set_title(one.name)
            axis.set_xlabel("tokens")
            for depth, length in np.ndindex(*means_DL.shape):
                score, count = float(means_DL[depth, length]), int(counts_DL[depth, length])
                _append(data, one.name, lengths[length], depth / DEPTH_BINS, score if count else None, count)
                if count:
                    colour = PAPER[0] if score > 0.6 else INK[0]
                    axis.text(length, depth, f"{100 * score:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes[0].set_ylabel("depth (%)")
        figure.colorbar(image, ax=axes, label="score (%)")
        return save(figure, data, folder, "depth")


def _group_table(
    answered: Sequence[Answered], samples: Sequence[Sample], metric: str, level: float, seed: int
) -> tuple[list[str], list[list[str]]]:
    """Every length and group; with two models, their difference and whether it is resolved."""
    shown, scores = _SHOWN[metric], [collect(one.items, samples, metric) for one in answered]
    header = ["tokens", "group", *(one.name for one in answered)]
    header += [f"{answered[0].name} - {answered[1].name}", ""] if len(answered) == 2 else []
    rows = []
    for length in scores[0].lengths:
        for group in scores[0].groups:
            row = [f"{length:,}", group]
            row += [shown.text(score_of(each, group, length, level, seed)) for each in scores]
            if len(answered) == 2:
                found = difference(scores[0], scores[1], group, length, level, seed)
                row += [shown.text(found), "resolved" if found.resolved else "not resolved"]
            rows.append(row)
    return header, rows


def _task_table(
    answered: Sequence[Answered], samples: Sequence[Sample], scores: Sequence[Scores]
) -> tuple[list[str], list[list[str]]]:
    haystacks = {one.task: one.haystack for one in samples}
    header = ["task", "haystack", "tokens", *(one.name for one in answered)]
    rows = [
        [task, haystacks[task], f"{length:,}", *(_percent(each.values[task, length].mean()) for each in scores)]
        for task in scores[0].groups[ALL]
        for length in scores[0].lengths
    ]
    return header, rows


def _label(group: str) -> str:
    return "\n".join([group, *GROUPS[group].split()])


def _ends(found: Interval) -> tuple[float, float, float]:
    return float(found.mean), float(found.low), float(found.high)


def _append(data: dict[str, list[Any]], *row: Any) -> None:
    for column, value in zip(data.values(), row, strict=True):
        column.append(value)


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _length(length: int | None) -> str:
    return "none" if length is None else f"{length:,}"
