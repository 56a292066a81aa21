"""The whole sensitivity analysis of one model's checkpoints: measure every condition, write tables, figures, page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from engram.config import UserError
from engram.report.figure import to_csv
from engram.training.files import write_atomically
from engram.training.provenance import origin
from eval.documents import read_documents
from eval.loading import Loaded, load, open_split
from eval.output import writing_into
from eval.perplexity import count_bytes
from eval.report import run_names
from eval.results import Item, summarise, write_results
from eval.sensitivity.interventions import NEED_REFERENCE, memory_of, read_reference
from eval.sensitivity.memory_loss import Floats, Ints, Names, frequency_bins, loss_changes, token_losses
from eval.sensitivity.page import ALL, Losses, build_page, loss_columns, retained_columns
from eval.sensitivity.retained import Condition, Part, Retained, Suite, conditions, retained
from eval.sensitivity.tasks import build_suites


@dataclass(frozen=True)
class Settings:
    """What to change in the memory, and what to measure; `data` None: what the first checkpoint was trained on."""

    tasks: tuple[str, ...]
    modes: tuple[str, ...]
    per: Part | None
    data: str | None
    tokens: int
    reference_tokens: int
    level: float
    seed: int
    # The file of a suite whose tasks are asked too.
    suite: str | None = None


@dataclass(frozen=True)
class Texts:
    """What all checkpoints read: validation documents for the loss, with each target's document, bytes and bin; and
    documents of the train split, whose rows take the place of the model's own."""

    described: str
    validation: list[list[int]]
    reference: list[list[int]]
    document_N: Ints
    bytes_N: Ints
    bin_N: Names


@dataclass(frozen=True)
class Measured:
    """One checkpoint, with memory as it is (None) and under each condition: losses of all targets, items of suites."""

    name: str
    folder: str
    step: int
    losses: dict[Condition | None, Floats]
    suites: dict[str, Suite]
    items: dict[str, dict[Condition | None, list[Item]]]


def study(
    checkpoints: Sequence[str], settings: Settings, out: Path, device: str, threads: int | None, console: Console
) -> list[str]:
    """Measure every checkpoint under every condition and write all into `out`; -> lines for the terminal.

    One checkpoint is in memory at a time. Raises UserError: no memory, checkpoints of different models or one given
    twice, a condition or task that the model cannot be asked.
    """
    names = run_names([Path(path) for path in checkpoints])
    runs: list[Measured] = []
    wanted: list[Condition] = []
    texts: Texts | None = None
    model: object = None
    benchmarks = _benchmarks(settings, out, device)
    with _progress(console) as advance:
        for name, path in zip(names, checkpoints, strict=True):
            loaded = load(path, device, "float32", threads)
            if str(loaded.folder) in [run.folder for run in runs]:
                raise UserError(f"{loaded.folder} is given twice: give runs that differ in their seeds")
            # Runs may differ in their seeds, and so in their addresses.
            this = loaded.tokenizer.digest, memory_of(loaded.model).model_dump(exclude={"seed"})
            if texts is None:
                wanted = conditions(memory_of(loaded.model), settings.modes, settings.per)
                texts, model = open_texts(loaded, settings), this
            elif this != model:
                raise UserError(
                    f"{name} has another tokenizer or memory than {names[0]}: give checkpoints of one model that "
                    "differ in their seeds, and compare models by running each on its own"
                )
            begin = partial(advance, len(checkpoints) * (1 + len(wanted)))
            runs.append(_measure(loaded, name, texts, wanted, settings, benchmarks, begin))
    assert texts is not None
    losses = _losses(runs, wanted, texts, settings) if "loss" in settings.tasks else []
    kept = _retained(runs, wanted, settings)
    with writing_into(out):
        _write(out, runs, kept, losses, texts, settings)
    return [*_lines(kept, losses), str(out / "sensitivity.html")]


def _benchmarks(settings: Settings, out: Path, device: str) -> Suite | None:
    if settings.suite is None:
        return None
    # It brings what runs benchmarks.
    from eval.sensitivity.benchmarks import benchmark_suite

    return benchmark_suite(Path(settings.suite), out / "suite", device)


def open_texts(loaded: Loaded, settings: Settings) -> Texts:
    """Documents as `settings` ask for them, cut to the training's sequence length."""
    data, length = settings.data or loaded.config.data.path, loaded.config.data.sequence_length
    empty = np.empty(0, np.int64)
    texts = Texts("", [], [], empty, empty, np.empty(0, np.str_))
    scores_loss = "loss" in settings.tasks
    needs_rows = any(mode in NEED_REFERENCE for mode in settings.modes)
    training = open_split(data, loaded.tokenizer, "train") if scores_loss or needs_rows else None
    if training is not None and needs_rows:
        texts = replace(texts, reference=read_documents(training, length, settings.reference_tokens))
    if training is not None and scores_loss:
        validation = open_split(data, loaded.tokenizer)
        documents = read_documents(validation, length, settings.tokens)
        lengths = [len(document) - 1 for document in documents]
        targets_N = np.concatenate([document[1:] for document in documents])
        texts = replace(
            texts,
            described=f"; {len(documents):,} validation documents of {validation.folder}, {sum(lengths):,} targets",
            validation=documents,
            document_N=np.repeat(np.arange(len(documents)), lengths),
            bytes_N=count_bytes(loaded.tokenizer)[targets_N],
            bin_N=frequency_bins(loaded, training, documents),
        )
    return texts


def _measure(
    loaded: Loaded,
    name: str,
    texts: Texts,
    wanted: Sequence[Condition],
    settings: Settings,
    benchmarks: Suite | None,
    begin: Callable[[str], None],
) -> Measured:
    suites = build_suites(settings.tasks, loaded, benchmarks)
    reference = read_reference(loaded.model, texts.reference) if texts.reference else None
    losses: dict[Condition | None, Floats] = {}
    items: dict[str, dict[Condition | None, list[Item]]] = {suite: {} for suite in suites}
    for condition in (None, *wanted):
        begin(f"{name}: {condition.label if condition else 'memory as it is'}")
        with condition.applied(loaded, reference) if condition else contextlib.nullcontext():
            if texts.validation:
                losses[condition] = token_losses(loaded.model, texts.validation)
            for suite in suites:
                items[suite][condition] = suites[suite].items(loaded)
    return Measured(name, str(loaded.folder), loaded.step, losses, suites, items)


def _losses(runs: Sequence[Measured], wanted: Sequence[Condition], texts: Texts, settings: Settings) -> Losses:
    """Of all runs together, then of each."""
    groups = [(ALL, list(runs)), *((run.name, [run]) for run in runs if len(runs) > 1)]
    found = []
    for condition in wanted:
        for name, group in groups:
            on_RN, off_RN = (np.stack([run.losses[key] for run in group]) for key in (None, condition))
            changes = loss_changes(
                on_RN, off_RN, texts.document_N, texts.bytes_N, texts.bin_N, settings.level, settings.seed
            )
            found.append((condition, name, changes))
    return found


def _retained(runs: Sequence[Measured], wanted: Sequence[Condition], settings: Settings) -> list[list[Retained]]:
    """One list for each condition; none without a suite."""
    found = []
    for condition in wanted:
        kept: list[Retained] = []
        for name, suite in runs[0].suites.items():
            on, off = ([run.items[name][key] for run in runs] for key in (None, condition))
            kept += retained(condition, suite, on, off, level=settings.level, seed=settings.seed)
        found.append(kept)
    return [kept for kept in found if kept]


def _write(
    out: Path,
    runs: Sequence[Measured],
    kept: Sequence[Sequence[Retained]],
    losses: Losses,
    texts: Texts,
    settings: Settings,
) -> None:
    subtitle = f"{', '.join(run.name for run in runs)}; step {runs[0].step:,}{texts.described}"
    out.mkdir(parents=True, exist_ok=True)
    build_page(subtitle, kept, losses, out, settings.level).write(out / "sensitivity.html")
    if kept:
        write_atomically(out / "retained.csv", to_csv(retained_columns([one for found in kept for one in found])))
    if losses:
        write_atomically(out / "loss.csv", to_csv(loss_columns(losses)))
    items = [item for run in runs for item in _all_items(run, texts)]
    facts: dict[str, Any] = {"checkpoints": [run.folder for run in runs], "settings": asdict(settings)}
    write_results(out, summarise(items), items, {**origin(), **facts})


def _all_items(run: Measured, texts: Texts) -> Iterator[Item]:
    """Items of suites, and each document's mean loss; the group tells the condition that they were asked under."""
    for by_condition in run.items.values():
        for condition, found in by_condition.items():
            yield from (replace(item, group=_group(run, condition)) for item in found)
    for condition, losses_N in run.losses.items():
        sums_D, counts_D = np.bincount(texts.document_N, losses_N), np.bincount(texts.document_N)
        for document, loss in enumerate((sums_D / counts_D).tolist()):
            yield Item("validation_loss", str(document), "nats_per_token", loss, _group(run, condition))


def _group(run: Measured, condition: Condition | None) -> str:
    return f"{run.name}; {condition.label if condition else 'as it is'}"


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, nothing elsewhere; each call begins another of `total` parts."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        begun = 0

        def advance(total: int, line: str) -> None:
            nonlocal begun
            bar.update(task, description=line, total=total, completed=begun)
            begun += 1

        yield advance


def _lines(kept: Sequence[Sequence[Retained]], losses: Losses) -> Iterator[str]:
    for one in (one for found in kept for one in found):
        share = "not above chance" if one.ratio is None else f"{one.ratio.mean:.1%} kept"
        yield f"{one.condition.label}: {one.task} {one.on:.3f} -> {one.off:.3f}, {share}"
    for condition, run, changes in losses:
        whole = changes[0]
        yield (
            f"{condition.label}, {run}: loss {whole.on:.4f} -> {whole.off:.4f}, "
            f"rise {whole.rise.mean:.4f} ({whole.rise.low:.4f} to {whole.rise.high:.4f}) nats per token"
        )
