"""LogitLens of two recipes: measure every run, and write tables, figures and a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from engram.report.figure import to_csv
from engram.training.files import write_atomically
from eval.documents import read_documents
from eval.lens import tuned_lens
from eval.lens.logit_lens import Lens, measure
from eval.lens.page import build_page
from eval.lens.tables import Settings, curve_rows, lines, sampled, scalar_rows
from eval.loading import Loaded, load, open_split
from eval.output import write_provenance, writing_into
from eval.progress import progress
from eval.sided_table import columns
from eval.sides import Texts, measured_on, open_runs, read_texts


def study(
    sides: dict[str, Sequence[str]], settings: Settings, out: Path, device: str, threads: int | None, console: Console
) -> list[str]:
    """Measure all runs, write tables, figures and page into `out`; -> lines for the terminal. Raises UserError."""
    runs, tokenizer = open_runs(sides)
    texts = read_texts(runs, tokenizer, settings.data, settings.tokens)
    logit: list[Lens] = []
    tuned: list[Lens] = []
    with progress(console) as bar:
        for index, run in enumerate(runs):
            loaded = load(run.folder, device, "float32", threads)
            name = f"{run.side} {index + 1}/{len(runs)}"
            logit.append(
                measure(loaded.model, texts.documents, streams=settings.streams, advance=bar(name, texts.targets))
            )
            if settings.tuned_steps:
                tuned.append(_tuned(loaded, texts, settings, name, bar))
    found = [sampled("logit", logit, settings)] + ([sampled("tuned", tuned, settings)] if tuned else [])
    lens_table = columns([row for curves in found for row in curve_rows(runs, curves, settings.level)])
    scalar_table = columns([row for curves in found for row in scalar_rows(runs, curves, settings)])
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "scalars.csv", to_csv(scalar_table))
        write_provenance(out, measured_on(runs, texts, settings))
        page = build_page(runs, found, (lens_table, scalar_table), settings, str(texts), out)
        page.write(out / "logit_lens.html")
    return [*lines(scalar_table), str(out / "logit_lens.html")]


def _tuned(
    loaded: Loaded, texts: Texts, settings: Settings, name: str, bar: Callable[[str, int], Callable[[int], None]]
) -> Lens:
    """Learned on documents of the train split: those that are measured are held out."""
    training = read_documents(open_split(texts.folder, loaded.tokenizer, "train"), texts.length, settings.tuned_tokens)
    steps = tuned_lens.Training(steps=settings.tuned_steps, seed=settings.seed)
    memory = loaded.config.model.memory
    maps = loaded.config.model.num_layers + (len(memory.layer_ids) if memory else 0)
    fitted = tuned_lens.fit(loaded.model, training, steps, bar(f"{name}, tuning", maps * settings.tuned_steps))
    translate = tuned_lens.translation(fitted)
    return measure(loaded.model, texts.documents, translate=translate, advance=bar(f"{name}, tuned", texts.targets))
