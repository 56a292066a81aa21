"""LongPPL from checkpoints to page: the evaluator's key tokens, one or two models' losses on them, tables, figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from engram.config import UserError
from engram.training.provenance import origin
from eval.documents import read_documents
from eval.loading import Loaded, open_split
from eval.long_ppl.cache import OWN_EVALUATOR, documents_digest, evaluator_losses
from eval.long_ppl.copy_texts import CopyText, agreement, copy_texts
from eval.long_ppl.measure import Losses, Windows, whole_losses
from eval.long_ppl.page import Draws, Measured, Thresholds, at, build_page, terminal_lines
from eval.models import load_models
from eval.output import writing_into
from eval.results import Item, Metric, write_results
from eval.score_cache import checkpoint_digest

# Documents of random tokens with copies, on which the evaluator is judged itself, and tokens of a copied stretch.
_COPY_TEXTS = 16
_STRETCH = 12
_EVALUATOR = "evaluator"


@dataclass(frozen=True)
class Wanted:
    """What to measure on; None: derived from the models' contexts (see eval/commands/long_ppl.py)."""

    evaluator: str
    data: str | None
    tokens: int
    context: int | None
    window: int | None
    stride: int | None
    alpha: float
    beta: float
    cache: Path
    level: float
    seed: int


def study(
    checkpoints: Mapping[str, str],
    wanted: Wanted,
    out: Path,
    device: str,
    threads: int | None,
    console: Console,
    note: str | None = None,
) -> list[str]:
    """Find the key tokens, measure each named checkpoint on them, write everything; -> lines for the terminal.

    Raises UserError: different tokenizers, a context beyond a model's, no document longer than the short context.
    """
    if _EVALUATOR in checkpoints:
        raise UserError(f"a model is called {_EVALUATOR!r}, as the evaluator is: give another --name")
    models = load_models({**checkpoints, _EVALUATOR: wanted.evaluator}, device, "float32", threads)
    context, windows = _sizes(models, wanted)
    evaluator = models.pop(_EVALUATOR)
    first = next(iter(models.values()))
    dataset = open_split(wanted.data or first.config.data.path, first.tokenizer)
    documents = read_documents(dataset, context, wanted.tokens, min_length=windows.window + windows.stride + 1)
    distance = windows.window + windows.stride
    texts = _copies(context, first.tokenizer.vocab_size, distance, wanted.seed)
    copies = [text.tokens for text in texts]
    chosen, draws = Thresholds(wanted.alpha, wanted.beta), Draws(wanted.level, wanted.seed)
    warnings = _warnings(evaluator, models)
    with writing_into(out):
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("evaluator", total=_tokens(documents, windows) + _tokens(copies, windows))
            losses = evaluator_losses(evaluator, documents, windows, wanted.cache, partial(bar.advance, task))
            copied = evaluator_losses(evaluator, copies, windows, wanted.cache, partial(bar.advance, task))
            measured = [_measure(name, loaded, documents, windows, bar) for name, loaded in models.items()]
        masks = [each.key(chosen.alpha, chosen.beta) for each in copied]
        judged = agreement(masks, [text.key[windows.window :] for text in texts])
        subtitle = (
            f"{len(documents):,} validation documents of {dataset.folder}, context {context:,}; short context "
            f"{windows.window:,} to {windows.window + windows.stride - 1:,} tokens; evaluator {evaluator.folder}"
        )
        notes = [*([note] if note else []), *warnings]
        page = build_page(subtitle, measured, losses, judged, chosen, draws, out, notes)
        page.write(out / "long_ppl.html")
        metrics, items = _results(measured, losses, chosen)
        facts = {
            "evaluator": _identity(evaluator),
            "models": {name: _identity(loaded) for name, loaded in models.items()},
            "data": str(dataset.folder),
            "documents_sha256": documents_digest(documents),
            "context": context,
            "windows": asdict(windows),
            "thresholds": asdict(chosen),
            "copies": {key: None if value != value else value for key, value in asdict(judged).items()},
            "matched": note,
        }
        write_results(out, metrics, items, {**origin(), **facts})
    lines = terminal_lines(measured, losses, chosen, draws)
    return [*(f"warning: {text}" for text in warnings), *lines, str(out / "long_ppl.html")]


def _measure(
    name: str, loaded: Loaded, documents: Sequence[Sequence[int]], windows: Windows, bar: Progress
) -> Measured:
    task = bar.add_task(name, total=sum(map(len, documents)))
    device = loaded.model.head.weight.device
    losses = whole_losses(loaded.model, documents, windows.window, device=device, advance=partial(bar.advance, task))
    return Measured(name, str(loaded.folder), loaded.step, losses)


def _copies(context: int, vocab_size: int, distance: int, seed: int) -> list[CopyText]:
    """Two copies in each document, of shorter stretches where the context has no room for usual ones."""
    stretch = min(_STRETCH, (context - distance) // 4 - 1)
    return copy_texts(_COPY_TEXTS, context, vocab_size, distance, seed, stretch=stretch)


def _sizes(models: Mapping[str, Loaded], wanted: Wanted) -> tuple[int, Windows]:
    """Context and windows: by default the shortest context of the models, an eighth and a thirty-second of it."""
    name, shortest = min(
        ((name, loaded.config.data.sequence_length) for name, loaded in models.items()), key=lambda pair: pair[1]
    )
    context = wanted.context or shortest
    if context > shortest:
        raise UserError(f"--context is {context:,}, but {name} was trained with {shortest:,} tokens: lower it")
    windows = Windows(wanted.window or max(1, context // 8), wanted.stride or max(1, context // 32))
    if windows.window + windows.stride >= context:
        raise UserError(
            f"--window {windows.window:,} and --stride {windows.stride:,} leave nothing of the context of {context:,} "
            "tokens: lower them"
        )
    return context, windows


def _warnings(evaluator: Loaded, models: Mapping[str, Loaded]) -> list[str]:
    """A model that chooses the key tokens chooses those that it is good at."""
    own = checkpoint_digest(evaluator.folder)
    return [OWN_EVALUATOR.format(name) for name, loaded in models.items() if checkpoint_digest(loaded.folder) == own]


def _results(
    measured: Sequence[Measured], evaluator: Sequence[Losses], chosen: Thresholds
) -> tuple[list[Metric], list[Item]]:
    """Corpus numbers, and each document's mean losses; standard errors are those of the documents' weighted mean."""
    metrics, items = [], []
    for one in measured:
        found = at(one, evaluator, chosen)
        for metric, sums, counts in (
            ("key_loss", found.key_sums, found.key_counts),
            ("loss", found.all_sums, found.all_counts),
        ):
            metrics.append(_metric(one.name, metric, sums, counts))
            items += [
                Item("long_ppl", str(document), metric, total / count, one.name)
                for document, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True))
                if count
            ]
    return metrics, items


def _metric(name: str, metric: str, sums: Any, counts: Any) -> Metric:
    weight = counts.sum()
    mean = float(sums.sum() / weight) if weight else float("nan")
    spread = float(np.sqrt(((sums - mean * counts) ** 2).sum()) / weight) if weight else float("nan")
    return Metric("long_ppl", metric, mean, spread, int(weight), name, higher_is_better=False)


def _tokens(documents: Sequence[Sequence[int]], windows: Windows) -> int:
    """Tokens that an evaluator reads, under both contexts."""
    width = windows.window + windows.stride
    short = sum(min(width, len(documents[index]) - start) for index, start in windows.places(documents))
    return short + sum(map(len, documents))


def _identity(loaded: Loaded) -> dict[str, Any]:
    return {"checkpoint": str(loaded.folder), "step": loaded.step, "sha256": checkpoint_digest(loaded.folder)}
