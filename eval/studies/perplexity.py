"""Loss of two recipes on the same documents, with intervals: per token, per byte, and by the place in the document.

Legend: N targets of all documents in their order, D documents, K places: octaves of the target's position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from engram.report.figure import SavedFigure, new_figure, save, to_csv
from engram.report.page import Page
from engram.report.style import COLOURS, MUTED, applied
from engram.training.files import write_atomically
from eval.bootstrap import Array, Interval, means, resampled_means
from eval.loading import load
from eval.output import write_provenance, writing_into
from eval.over_runs import Sample
from eval.perplexity import count_bytes
from eval.progress import progress
from eval.sensitivity.memory_loss import token_losses
from eval.sided_table import ALL, IN_THESE_RUNS, columns, compared, estimates, rows, side_names, side_of
from eval.sides import Run, Texts, measured_on, open_runs, read_texts

METRICS = {"loss": "nats per token", "bits_per_byte": "bits per byte of text", "perplexity": "exp(loss)"}
READING = (
    "Every token of each document but its first, given those before it. Documents are cut to the shorter sequence "
    "length of the models; each is read on its own, so that its first tokens have little context."
)


@dataclass(frozen=True)
class Settings:
    """`data` None: what the first checkpoint was trained on."""

    data: str | None = None
    tokens: int = 100_000
    level: float = 0.9
    seed: int = 0


def study(
    sides: dict[str, Sequence[str]], settings: Settings, out: Path, device: str, threads: int | None, console: Console
) -> list[str]:
    """Measure all runs, write tables, figure and page into `out`; -> lines for the terminal. Raises UserError."""
    runs, tokenizer = open_runs(sides)
    texts = read_texts(runs, tokenizer, settings.data, settings.tokens)
    bytes_V = count_bytes(tokenizer)
    whole: list[Sample] = []
    by_place: list[Sample] = []
    with progress(console) as bar:
        advance = bar("loss", len(runs))
        for run in runs:
            losses_N = token_losses(load(run.folder, device, "float32", threads).model, texts.documents)
            whole.append(loss_sample(losses_N, texts, bytes_V, settings.seed))
            by_place.append(place_sample(losses_N, texts, settings.seed))
            advance(1)
    table = _table(runs, whole, [{"metric": name, "unit": unit} for name, unit in METRICS.items()], settings.level)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "losses.csv", to_csv(table))
        write_provenance(out, measured_on(runs, texts, settings))
        _page(runs, by_place, table, texts, settings, out).write(out / "perplexity.html")
    lines = [" ".join(row).rstrip() for row in _shown(table) if row[1] == METRICS["loss"]]
    return [*lines, str(out / "perplexity.html")]


def loss_sample(losses_N: Array, texts: Texts, bytes_V: npt.NDArray[np.int64], seed: int) -> Sample:
    """METRICS of all targets together, and of draws of documents."""
    document_N = _documents(texts)
    targets_N = np.concatenate([document[1:] for document in texts.documents])
    sums_D, counts_D = np.bincount(document_N, losses_N), np.bincount(document_N)
    bytes_D = np.bincount(document_N, bytes_V[targets_N])
    nats, bits = (sums_D, counts_D), (sums_D / math.log(2), bytes_D)
    value, draws = (
        [ratio(*pair) for pair in (nats, bits)]
        for ratio in (means, lambda sums, counts: resampled_means(sums, counts, seed=seed))
    )
    return Sample(np.stack([*value, np.exp(value[0])]), np.stack([*draws, np.exp(draws[0])], -1))


def place_sample(losses_N: Array, texts: Texts, seed: int) -> Sample:
    """Mean loss [K] of the targets at positions 1, 2 to 3, 4 to 7, ... of their documents."""
    position_N = np.concatenate([np.arange(1, len(document)) for document in texts.documents])
    place_N = np.log2(position_N).astype(np.int64)
    shape = len(texts.documents), int(place_N.max()) + 1
    flat_N = _documents(texts) * shape[1] + place_N
    sums_DK = np.bincount(flat_N, losses_N, math.prod(shape)).reshape(shape)
    counts_DK = np.bincount(flat_N, minlength=math.prod(shape)).reshape(shape)
    return Sample(means(sums_DK, counts_DK), resampled_means(sums_DK, counts_DK, seed=seed))


def _documents(texts: Texts) -> Any:
    return np.repeat(np.arange(len(texts.documents)), [len(document) - 1 for document in texts.documents])


def _table(runs: Sequence[Run], samples: Sequence[Sample], keys: list[dict[str, Any]], level: float) -> dict[str, Any]:
    difference = compared(runs, samples, level)
    found = [*estimates(runs, samples, level), *([difference] if difference else [])]
    return columns(rows(found, runs, keys))


def _page(
    runs: Sequence[Run],
    by_place: Sequence[Sample],
    table: dict[str, list[Any]],
    texts: Texts,
    settings: Settings,
    out: Path,
) -> Page:
    sides = side_names(runs)
    page = Page("Perplexity", f"{' and '.join(sides)}; {texts}")
    page.text(READING)
    seeds = " and runs" if len(runs) > len(sides) else "; one run of each model says nothing about other seeds"
    page.table(
        ("", "unit", f"mean [{settings.level:.0%} interval]", "resolved"),
        _shown(table),
        f"Intervals over documents{seeds}.",
    )
    page.section("By place in the document")
    page.figure(
        place_figure(runs, by_place, settings.level, out),
        f"Targets in octaves of their position; bands: {settings.level:.0%} intervals over documents{seeds}. ",
    )
    return page


def place_figure(runs: Sequence[Run], samples: Sequence[Sample], level: float, folder: Path) -> SavedFigure:
    """Loss over the position of the target, and the difference of the two sides, where there are two."""
    found, difference = estimates(runs, samples, level), compared(runs, samples, level)
    starts = [2**place for place in range(samples[0].value.size)]
    table = _table(runs, samples, [{"from_position": start, "to_position": 2 * start - 1} for start in starts], level)
    with applied():
        figure, axes = new_figure(1, 2 if difference else 1)
        for side, colour in zip(side_names(runs), COLOURS, strict=False):
            interval = side_of(found, side)
            _band(axes[0], starts, interval, colour)
            axes[0].plot([], [], color=colour, label=side)
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].legend()
        if difference:
            axes[1].axhline(0, color=MUTED[0], linewidth=1)
            _band(axes[1], starts, difference.interval, COLOURS[0])
            axes[1].set_ylabel(f"{difference.side} (nats)")
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xlabel("position in the document")
        return save(figure, table, folder, "loss_by_place")


def _band(axis: Any, x: Sequence[int], interval: Interval, colour: str) -> None:
    axis.plot(x, interval.mean, marker="o", markersize=3, color=colour)
    if not np.isnan(interval.low).all():
        axis.fill_between(x, interval.low, interval.high, color=colour, alpha=0.18, linewidth=0)


def _shown(table: dict[str, list[Any]]) -> list[list[str]]:
    """Rows of sides and their difference: name, unit, mean with interval, and whether a difference is resolved."""
    names = ("model", "run", "unit", "mean", "low", "high", "resolved")
    body = []
    for side, run, unit, mean, low, high, resolved in zip(*(table[name] for name in names), strict=True):
        if run == ALL:
            ends = "" if low is None else f" [{low:.4f}, {high:.4f}]"
            words = {None: "", "yes": "resolved", "no": "not resolved", IN_THESE_RUNS: f"resolved {IN_THESE_RUNS}"}
            verdict = words[resolved]
            body.append([side, unit, f"{mean:.4f}{ends}", verdict])
    return body
