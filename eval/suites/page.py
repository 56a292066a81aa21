"""What a suite shows: scores with intervals, two models' differences, and scores over the last checkpoints."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, MUTED, applied
from eval.benchmarks.catalogue import benchmarks
from eval.results import Metric
from eval.suites.compare import Difference, as_columns, overall
from eval.suites.run import Outcome
from eval.suites.settings import Suite

_PER_ROW = 3


def write_page(
    suite: Suite,
    outcomes: Sequence[Sequence[Outcome]],
    differences: Sequence[Difference],
    out: Path,
    note: str | None = None,
) -> Path:
    """Figures and `index.html` in `out`. `outcomes`: of each model its checkpoints, the model before the baseline.

    `note`: how the model's checkpoint was chosen.
    """
    latest = [series[-1] for series in outcomes]
    page = Page("Evaluation", " and ".join(f"{one.label}: {one.folder}, step {one.step:,}" for one in latest))
    if note:
        page.note(note)
    for one in latest:
        for warning in one.warnings:
            page.note(f"{one.label}: {warning}")
        for task, reason in one.failed.items():
            page.note(f"{one.label}: {task} was not measured: {reason}")
    page.section("Scores", f"Means over items with {suite.level:.0%} intervals of the bootstrap over items.")
    for one in latest:
        page.table(
            ("task", "metric", "value", "low", "high", "items", "shots", "cut off"),
            [_row(one, metric) for metric in one.metrics if _shown(one, metric)],
            caption=one.label,
        )
    if differences:
        page.section(
            "Paired comparison",
            f"{latest[0].label} minus {latest[1].label} on the same items, {suite.level:.0%} intervals. A difference "
            "is resolved where its interval leaves out zero and, for right or wrong answers, McNemar's exact test "
            "agrees.",
        )
        whole = overall(differences)
        page.figure(
            comparison_figure(whole, differences, suite.level, out),
            "Each difference with its interval, divided by half of the interval's width. Blue: better; orange: "
            "worse; grey: not resolved.",
        )
        page.table(
            ("task", "metric", "difference", "low", "high", "items", "gained", "lost", "p", "verdict"),
            [
                (_name(d.task, d.group), d.metric, *(f"{x:.4f}" for x in (d.difference, d.low, d.high)), d.n)
                + (d.gained, d.lost, "–" if math.isnan(d.p_value) else f"{d.p_value:.3f}", d.verdict)
                for d in whole
            ],
        )
    if any(len(series) > 1 for series in outcomes):
        page.section("Last checkpoints", "How far the scores move from one checkpoint to the next.")
        if figure := series_figure(outcomes, out):
            page.figure(figure, "Each task's main metric over training steps, with intervals; those that all have.")
        else:
            page.note("No task has a score in all of them.")
    return page.write(out / "index.html")


def comparison_figure(
    differences: Sequence[Difference], table: Sequence[Difference], level: float, folder: Path
) -> SavedFigure:
    """One row for each difference, divided by half of its own interval's width, so that all fit on one axis.

    `table`: those of groups too, which stand in the CSV.
    """
    with applied():
        figure, (axis,) = new_figure(height=0.8 + 0.22 * len(differences))
        for row, one in enumerate(differences):
            half = (one.high - one.low) / 2
            scale = half if half > 0 else 1.0
            colour = MUTED[0] if one.verdict == "not resolved" else COLOURS[0 if one.verdict == "better" else 1]
            axis.plot([one.low / scale, one.high / scale], [row, row], color=colour)
            axis.plot(one.difference / scale, row, "o", color=colour, markersize=3.5)
        axis.axvline(0, color=MUTED[0], linewidth=0.8)
        names = [f"{_name(one.task, one.group)}: {one.metric}" for one in differences]
        axis.set_yticks(range(len(differences)), names)
        axis.invert_yaxis()
        axis.set_xlabel(f"difference / half-width of its {level:.0%} interval")
        return save(figure, as_columns(table), folder, "comparison")


def series_figure(outcomes: Sequence[Sequence[Outcome]], folder: Path) -> SavedFigure | None:
    """A panel for each task that all have; the table adds the mean over the checkpoints and their standard deviation.

    None where they have none in common.
    """
    everywhere = [{(m.task, m.metric, m.group) for m in one.metrics} for series in outcomes for one in series]
    tasks = [key for key in _main_metrics(outcomes[0][-1].metrics) if all(key in found for found in everywhere)]
    if not tasks:
        return None
    rows = -(-len(tasks) // _PER_ROW)
    table: dict[str, list[Any]] = {
        name: [] for name in ("model", "task", "metric", "group", "step", "value", "low", "high", "mean", "step_noise")
    }
    with applied():
        figure, axes = new_figure(rows, min(_PER_ROW, len(tasks)), height=0.5 + 1.9 * rows)
        for axis, key in zip(axes, tasks, strict=False):
            for index, series in enumerate(outcomes):
                points = [(one.step, *_point(one, key)) for one in series]
                steps, values, lows, highs = (list(column) for column in zip(*points, strict=True))
                axis.plot(steps, values, marker="o", markersize=3, color=COLOURS[index], label=series[-1].label)
                axis.fill_between(steps, lows, highs, color=COLOURS[index], alpha=0.15, linewidth=0)
                noise = statistics.stdev(values) if len(values) > 1 else math.nan
                for point in points:
                    line = (series[-1].label, *key, *point, statistics.fmean(values), noise)
                    for column, cell in zip(table.values(), line, strict=True):
                        column.append(cell)
            axis.set_title(f"{_name(key[0], key[2])}: {key[1]}", fontsize=8)
            axis.set_xlabel("step")
        for axis in axes[len(tasks) :]:
            axis.set_axis_off()
        if len(outcomes) > 1:
            axes[0].legend()
        return save(figure, table, folder, "series")


def _main_metrics(metrics: Sequence[Metric]) -> list[tuple[str, str, str]]:
    """For each task the paper's metric, or its first; over all groups where there is such a line."""
    found: dict[str, tuple[str, str, str]] = {}
    for metric in metrics:
        known = benchmarks().get(metric.task)
        key = (metric.task, metric.metric, metric.group)
        wanted = known is not None and metric.metric.partition(",")[0] == known.metric
        if metric.task not in found or (wanted and (metric.group == "" or found[metric.task][1] != metric.metric)):
            found[metric.task] = key
    return list(found.values())


def _point(outcome: Outcome, key: tuple[str, str, str]) -> tuple[float, float, float]:
    value = next(one.value for one in outcome.metrics if (one.task, one.metric, one.group) == key)
    return value, *outcome.intervals.get(key, (value, value))


def _row(outcome: Outcome, metric: Metric) -> tuple[object, ...]:
    low, high = outcome.intervals.get((metric.task, metric.metric, metric.group), (math.nan, math.nan))
    ends = ("–" if math.isnan(end) else f"{end:.4f}" for end in (low, high))
    name = _name(metric.task, metric.group)
    return name, metric.metric, f"{metric.value:.4f}", *ends, metric.n, metric.num_shots, metric.num_truncated


def _shown(outcome: Outcome, metric: Metric) -> bool:
    """Groups of a task that has a line over all of them stay in the tables."""
    whole = any(o.task == metric.task and o.metric == metric.metric and o.group == "" for o in outcome.metrics)
    return metric.group == "" or not whole


def _name(task: str, group: str) -> str:
    return f"{task}, {group}" if group else task
