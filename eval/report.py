"""The report of one run, or of several side by side: `report.html`, its figures, and a summary for the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from engram.config import UserError
from engram.model.accounting import ParameterCounts, count_parameters
from engram.report.figure import to_csv
from engram.report.page import Page
from engram.report.text import short
from eval.curves import loss_figure, schedule_figure, statistics_figure
from eval.gates import text as gates
from eval.loading import check_target
from eval.ngram import Baselines
from eval.perplexity import bits_per_byte
from eval.runs import Run, read_run

MISSING = "–"


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, **options: Any
) -> tuple[Path, list[Run]]:
    """Build the page of the runs in `folders`; `options` go to `read_run`.

    Default place: `RUN_DIR/report.html`, or `comparison.html` beside the first of several. Figures stand beside the
    page in `<page>_figures`. Raises UserError.
    """
    names = run_names([Path(folder) for folder in folders])
    first = Path(folders[0])
    default = first / "report.html" if len(folders) == 1 else first.resolve().parent / "comparison.html"
    path = Path(out) if out else default
    check_target(path)
    runs = [read_run(folder, name, **options) for folder, name in zip(folders, names, strict=True)]
    try:
        page = build_page(runs, path.with_name(f"{path.stem}_figures"))
        return page.write(path), runs
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}: name another file with --out") from None


def build_page(runs: Sequence[Run], figures: Path) -> Page:
    """All sections; figures and their data are written into the folder `figures`."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    page = Page(title, "; ".join(_state(run, named=len(runs) > 1) for run in runs))
    if len(runs) == 1:
        page.tiles(_headline(runs[0]))
    for run in runs:
        for note in run.notes:
            page.note(f"{run.name}: {note}")
    _losses(page, runs)
    _training(page, runs, figures)
    _gates(page, runs, figures)
    _samples(page, runs)
    _parameters(page, runs)
    _provenance(page, runs)
    return page


def print_summary(runs: Sequence[Run], path: Path, console: Console) -> None:
    """The models' losses against the n-gram models', the samples, and where the page is."""
    table = Table(title="loss on validation data", title_justify="left")
    header, rows, strong = loss_table(runs)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for index, row in enumerate(rows):
        table.add_row(*row, style="bold" if index in strong else None)
    if rows:
        console.print(table)
    for run in runs:
        for note in run.notes:
            console.print(f"{run.name}: {note}", style="yellow", markup=False)
        if run.sample is not None:
            console.print(f"\nsample of {run.name}", style="bold", markup=False)
            console.print(run.config.eval.prompt + run.sample, markup=False, highlight=False)
    console.print(f"\nreport: {path}", markup=False, highlight=False, soft_wrap=True)


def loss_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and which rows are models: each model, then the n-gram models on its targets, by loss."""
    header = ["", "nats / token", "bits / byte", "perplexity", "model is lower by"]
    rows: list[list[str]] = []
    strong: list[int] = []
    groups: dict[tuple[Baselines | None, int], list[Run]] = {}
    for run in runs:
        if run.result:
            groups.setdefault((run.baselines, run.result.bytes), []).append(run)
    for (baselines, num_bytes), group in groups.items():
        best = min(run.result.loss for run in group if run.result)
        for run in group:
            assert run.result is not None
            strong.append(len(rows))
            rows.append([run.name, *_loss_cells(run.result.loss, run.result.targets, num_bytes), ""])
        for name, loss in sorted(_levels(baselines).items(), key=lambda level: level[1]):
            assert baselines is not None
            rows.append([f"{name} model", *_loss_cells(loss, baselines.targets, num_bytes), f"{loss - best:+.3f}"])
    return header, rows, strong


def _losses(page: Page, runs: Sequence[Run]) -> None:
    header, rows, strong = loss_table(runs)
    if not rows:
        return
    page.section(
        "Against n-gram models",
        "The same validation targets, with the context that the model sees there. The n-gram models were counted on "
        "the train split: add-one unigrams, interpolated modified Kneser-Ney bigrams and trigrams.",
    )
    measured = next(run for run in runs if run.result)
    assert measured.result is not None
    caption = (
        f"{measured.result.targets:,} targets, {measured.result.bytes:,} bytes of text; models computed in float32."
    )
    if len(runs) > 1:
        caption += " The last column compares with the best model."
    page.table(header, rows, caption, strong)


def _training(page: Page, runs: Sequence[Run], figures: Path) -> None:
    metrics = {run.name: run.metrics for run in runs}
    levels = {name: loss for run in reversed(runs) for name, loss in _levels(run.baselines).items()}
    page.section("Training")
    page.figure(
        loss_figure(metrics, levels, figures),
        "Training loss (of each logged step) and validation loss. Dashed: n-gram models on the validation targets. ",
    )
    page.figure(schedule_figure(metrics, figures), "Learning rate, gradient norm before clipping, and speed. ")
    drawings = [(run, statistics_figure(run.metrics, figures, run.name)) for run in runs]
    if any(drawing for _, drawing in drawings):
        page.section("Inside the layers")
        for run, drawing in drawings:
            if drawing is not None:
                page.figure(drawing, f"{run.name}: statistics of each layer over tokens; dashes tell streams apart. ")


def _gates(page: Page, runs: Sequence[Run], figures: Path) -> None:
    measured = [(run, run.gates) for run in runs if run.gates]
    if not measured:
        return
    page.section("Memory gates", gates.CAPTION)
    for run, found in measured:
        if len(runs) > 1:
            page.heading(run.name)
        page.html(found.html())
        figures.mkdir(parents=True, exist_ok=True)
        (figures / f"gates_{run.name}.csv").write_text(to_csv(found.columns()), encoding="utf-8")


def _samples(page: Page, runs: Sequence[Run]) -> None:
    sampled = [(run, run.sample) for run in runs if run.sample is not None]
    if not sampled:
        return
    first = runs[0].config
    page.section("Sample", f"Temperature {first.eval.temperature:g}; the prompt is grey.")
    parts = []
    for run, text in sampled:
        part = Page(run.name)
        if len(runs) > 1:
            part.heading(run.name)
        part.quote(text, lead=run.config.eval.prompt)
        parts.append(part)
    page.columns(parts)


def _parameters(page: Page, runs: Sequence[Run]) -> None:
    counts = [count_parameters(run.config.model) for run in runs]
    page.section("Parameters", "Total and activated parameters leave out the vocabulary's two matrices.")
    rows = [
        [name, *(f"{value(count):,}" for count in counts)]
        for name, value in {
            "total": lambda count: count.total,
            "activated by one token": lambda count: count.activated,
            "n-gram tables": lambda count: count.memory,
            "vocabulary (embedding and head)": lambda count: count.vocabulary,
        }.items()
    ]
    rows += [[f"optimizer role: {role}", *(f"{count.roles[role]:,}" for count in counts)] for role in counts[0].roles]
    page.table(["", *(run.name for run in runs)], rows, strong=[0])
    for run, count in zip(runs, counts, strict=True):
        page.details(f"Parts of {run.name}", _parts(count))


def _provenance(page: Page, runs: Sequence[Run]) -> None:
    page.section("Configuration and provenance")
    differing = _differences(runs)
    if len(runs) > 1:
        page.table(["setting", *(run.name for run in runs)], differing, "Settings in which the runs differ.")
    facts: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        for key, value in _flat({**run.code, **(run.done or {})}):
            facts.setdefault(key, [MISSING] * len(runs))[index] = _text(value)
    page.table(["", *(run.name for run in runs)], [[key, *values] for key, values in facts.items()])
    for run in runs:
        text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
        page.details(f"Every setting of {run.name}", text)


def _headline(run: Run) -> Iterator[tuple[str, str]]:
    counts = count_parameters(run.config.model)
    if run.result:
        yield f"{run.result.loss:.3f}", "validation loss, nats per token"
        yield f"{run.result.bits_per_byte:.3f}", "bits per byte"
    if run.result and run.baselines:
        gain = run.baselines.bigram - run.result.loss
        yield f"{abs(gain):.3f}", f"nats {'better' if gain > 0 else 'worse'} than a Kneser-Ney bigram"
    yield short(counts.total + counts.vocabulary), f"parameters, {short(counts.memory)} of them in n-gram tables"
    yield short(run.metrics[-1]["tokens"]), "tokens of training"


def _state(run: Run, named: bool) -> str:
    reached = f"step {run.metrics[-1]['step']:,} of {run.config.train.steps:,}"
    text = f"finished, {reached}" if run.done else f"unfinished, {reached}"
    if run.step is not None and run.step != run.metrics[-1]["step"]:
        text += f", measured at step {run.step:,}"
    return f"{run.name}: {text}" if named else text


def _levels(baselines: Baselines | None) -> dict[str, float]:
    return {name: getattr(baselines, name) for name in ("unigram", "bigram", "trigram")} if baselines else {}


def _loss_cells(loss: float, targets: int, num_bytes: int) -> list[str]:
    return [f"{loss:.4f}", f"{bits_per_byte(loss, targets, num_bytes):.4f}", f"{math.exp(loss):,.1f}"]


def _parts(counts: ParameterCounts) -> str:
    lines = [f"{'part':28}{'role':8}{'parameters':>16}{'activated':>16}"]
    lines += [f"{part.name:28}{part.role:8}{part.parameters:>16,}{part.activated:>16,}" for part in counts.parts]
    return "\n".join(lines)


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Settings that are not the same in all runs, with each run's value."""
    flat = [dict(_flat(run.config.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(_text(settings.get(key)) for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, 8):
        names = ["_".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"run_{index}" for index in range(len(folders))]
