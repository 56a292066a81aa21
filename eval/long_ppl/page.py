"""LongPPL's figure and page: perplexity of key tokens beside that of all, and what other thresholds would give."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.page import Page
from engram.report.style import COLOURS, applied
from eval.bootstrap import Interval, interval, paired
from eval.long_ppl.copy_texts import Agreement
from eval.long_ppl.measure import Floats, LongPpl, Losses, long_ppl

READING = (
    "Key tokens are those that the evaluator predicts far better with the whole document before them than with its "
    "near part alone, and predicts well at all. LongPPL is the perplexity of the key tokens; the other column is that "
    "of all tokens after the first short context."
)
COPIES = (
    "Documents of random tokens in which stretches stand twice: which tokens need the far part is known. A low recall "
    "says that the evaluator itself reads no far context there, and that its key tokens are to be read with care."
)
# Thresholds around those of the paper.
ALPHAS = (0.5, 1.0, 2.0, 3.0)
BETAS = (-1.0, -2.0, -4.0)
# With fewer, drawing documents anew says little about other documents.
FEWEST_DOCUMENTS = 10


@dataclass(frozen=True)
class Thresholds:
    alpha: float
    beta: float


@dataclass(frozen=True)
class Measured:
    """A model's losses of each document's tokens from K on, float64 [S] each."""

    name: str
    folder: str
    step: int
    losses: list[Floats]


@dataclass(frozen=True)
class Draws:
    """Of the bootstrap over documents."""

    level: float
    seed: int


def at(one: Measured, evaluator: Sequence[Losses], chosen: Thresholds) -> LongPpl:
    """A model's LongPPL under thresholds."""
    return long_ppl(one.losses, [each.key(chosen.alpha, chosen.beta) for each in evaluator])


def of_key(found: LongPpl, draws: Draws) -> Interval:
    """LongPPL with its interval over the documents that have key tokens: the others are skipped, as in the paper."""
    some = found.key_counts > 0
    return _exponential(interval(found.key_sums[some], found.key_counts[some], draws.level, seed=draws.seed))


def of_all(found: LongPpl, draws: Draws) -> Interval:
    """Perplexity of all tokens from K on with its interval over documents."""
    return _exponential(interval(found.all_sums, found.all_counts, draws.level, seed=draws.seed))


def difference(a: LongPpl, b: LongPpl, draws: Draws) -> Interval:
    """log LongPPL of a less that of b, in nats per key token, on the same documents."""
    some = a.key_counts > 0
    return paired(a.key_sums[some], b.key_sums[some], a.key_counts[some], draws.level, seed=draws.seed)


def build_page(
    subtitle: str,
    measured: Sequence[Measured],
    evaluator: Sequence[Losses],
    copies: Agreement,
    chosen: Thresholds,
    draws: Draws,
    folder: Path,
    notes: Sequence[str],
) -> Page:
    """The figure is written into `folder`."""
    page = Page("LongPPL", subtitle)
    page.text(READING)
    for note in notes:
        page.note(note)
    found = [at(one, evaluator, chosen) for one in measured]
    page.tiles(
        [(_number(each.long_ppl), f"{one.name}: LongPPL") for one, each in zip(measured, found, strict=True)]
        + [(f"{found[0].key_tokens:,}", "key tokens"), (f"{found[0].key_rate:.2%}", "of the tokens")]
    )
    page.section("Perplexity", f"alpha {chosen.alpha:g}, beta {chosen.beta:g}, in nats.")
    page.figure(figure(measured, evaluator, chosen, draws, folder), "Left: with intervals over documents. ")
    header = ["", "checkpoint", "step", "LongPPL", "perplexity of all", "key tokens", "key rate"]
    page.table(
        header,
        [
            [one.name, one.folder, f"{one.step:,}", _shown(of_key(each, draws)), _shown(of_all(each, draws))]
            + [f"{each.key_tokens:,}", f"{each.key_rate:.2%}"]
            for one, each in zip(measured, found, strict=True)
        ],
        caption=f"Intervals at {draws.level:.0%}: 2,000 bootstrap draws of documents.",
    )
    if len(measured) == 2:
        page.text(comparison(measured, found, draws))
    page.section("Thresholds", "The paper's are alpha 2 and beta -2; a verdict that others turn round is none.")
    page.table(*_threshold_table(measured, evaluator))
    page.section("The evaluator itself", COPIES)
    page.table(
        ["true key tokens", "found", "precision", "recall"],
        [[f"{copies.true:,}", f"{copies.found:,}", _number(copies.precision), _number(copies.recall)]],
    )
    return page


def comparison(measured: Sequence[Measured], found: Sequence[LongPpl], draws: Draws) -> str:
    """The two models' difference in words."""
    if not found[0].key_tokens:
        return "no key token was found: nothing is compared"
    gap, documents = difference(found[0], found[1], draws), int((found[0].key_counts > 0).sum())
    mean, low, high = (float(end) for end in (gap.mean, gap.low, gap.high))
    verdict = "resolved" if gap.resolved else "not resolved"
    if documents < FEWEST_DOCUMENTS:
        verdict = f"not resolved: {documents} documents with key tokens are too few for an interval"
    return (
        f"log LongPPL, {measured[0].name} - {measured[1].name}: {mean:+.3f} nats per key token ({low:+.3f} to "
        f"{high:+.3f}), {verdict}; the spread between seeds of training is not in it."
    )


def terminal_lines(
    measured: Sequence[Measured], evaluator: Sequence[Losses], chosen: Thresholds, draws: Draws
) -> list[str]:
    """One line for each model, and their difference."""
    found = [at(one, evaluator, chosen) for one in measured]
    lines = [
        f"{one.name}: LongPPL {_shown(of_key(each, draws))}, perplexity of all {_shown(of_all(each, draws))}, "
        f"{each.key_tokens:,} key tokens ({each.key_rate:.2%})"
        for one, each in zip(measured, found, strict=True)
    ]
    return lines + ([comparison(measured, found, draws)] if len(measured) == 2 else [])


def figure(
    measured: Sequence[Measured], evaluator: Sequence[Losses], chosen: Thresholds, draws: Draws, folder: Path
) -> SavedFigure:
    """Left: both perplexities of each model; right: LongPPL over alpha."""
    names = ("model", "metric", "alpha", "beta", "value", "low", "high", "key_tokens")
    data: dict[str, list[Any]] = {name: [] for name in names}
    with applied():
        drawn, (left, right) = new_figure(1, 2, height=2.6)
        for index, one in enumerate(measured):
            found = at(one, evaluator, chosen)
            for place, (metric, one_interval) in enumerate(
                (("LongPPL", of_key(found, draws)), ("perplexity", of_all(found, draws)))
            ):
                mean, low, high = (float(end) for end in (one_interval.mean, one_interval.low, one_interval.high))
                x = place + 0.18 * (index - (len(measured) - 1) / 2)
                left.plot([x, x], [low, high], color=COLOURS[index], linewidth=1.2)
                left.plot(x, mean, marker="o", color=COLOURS[index], label=one.name if place == 0 else None)
                _append(data, one.name, metric, chosen.alpha, chosen.beta, mean, low, high, found.key_tokens)
            curve = [at(one, evaluator, Thresholds(alpha, chosen.beta)) for alpha in ALPHAS]
            right.plot(ALPHAS, [each.long_ppl for each in curve], color=COLOURS[index], marker="o", markersize=4)
            for alpha, each in zip(ALPHAS, curve, strict=True):
                row = (one.name, "LongPPL over alpha", alpha, chosen.beta, each.long_ppl, None, None, each.key_tokens)
                _append(data, *row)
        left.set_xticks([0, 1], ["LongPPL", "all tokens"])
        left.set_xlim(-0.6, 1.6)
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter("{x:g}")
        left.set_ylabel("perplexity")
        left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(measured))
        right.set_xlabel(f"alpha (nats), at beta {chosen.beta:g}")
        right.set_ylabel("LongPPL")
        return save(drawn, data, folder, "long_ppl")


def _threshold_table(measured: Sequence[Measured], evaluator: Sequence[Losses]) -> tuple[list[str], list[list[str]]]:
    header = ["alpha", "beta", "key tokens", "key rate", *(one.name for one in measured)]
    rows = []
    for alpha in ALPHAS:
        for beta in BETAS:
            found = [at(one, evaluator, Thresholds(alpha, beta)) for one in measured]
            rows.append(
                [f"{alpha:g}", f"{beta:g}", f"{found[0].key_tokens:,}", f"{found[0].key_rate:.2%}"]
                + [_number(each.long_ppl) for each in found]
            )
    return header, rows


def _append(data: dict[str, list[Any]], *row: Any) -> None:
    for column, value in zip(data.values(), row, strict=True):
        column.append(None if isinstance(value, float) and np.isnan(value) else value)


def _exponential(found: Interval) -> Interval:
    return Interval(np.exp(found.mean), np.exp(found.low), np.exp(found.high))


def _shown(found: Interval) -> str:
    mean, low, high = (float(end) for end in (found.mean, found.low, found.high))
    return "–" if np.isnan(mean) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
