"""Effective depth of two recipes: measure every run, and write tables, figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engram.config import UserError
from engram.report.figure import to_csv
from engram.training.files import write_atomically
from eval.depth import contributions as effective_depth
from eval.depth.contributions import Depth
from eval.depth.page import Found, build_page
from eval.depth.shift import measure_shift, shift_rows, shift_scalar_rows
from eval.depth.tables import block_rows, centre_rows, depth_sample
from eval.lens import logit_lens
from eval.lens.logit_lens import Lens
from eval.lens.tables import Settings, lines, sampled, scalar_rows
from eval.loading import load
from eval.output import write_provenance, writing_into
from eval.progress import progress
from eval.sided_table import columns
from eval.sides import measured_on, open_runs, read_texts


def study(
    sides: dict[str, Sequence[str]], settings: Settings, out: Path, device: str, threads: int | None, console: Console
) -> list[str]:
    """Measure all runs, write tables, figures and page into `out`; -> lines for the terminal. Raises UserError."""
    runs, tokenizer = open_runs(sides)
    texts = read_texts(runs, tokenizer, settings.data, settings.tokens)
    lenses: list[Lens] = []
    depths: list[Depth] = []
    with progress(console) as bar:
        for index, run in enumerate(runs):
            model = load(run.folder, device, "float32", threads).model
            name = f"{run.side} {index + 1}/{len(runs)}"
            lenses.append(logit_lens.measure(model, texts.documents, advance=bar(f"{name}, lens", texts.targets)))
            depths.append(effective_depth.measure(model, texts.documents, advance=bar(f"{name}, skips", texts.targets)))
    curves = sampled("logit", lenses, settings)
    samples = [depth_sample(depth, settings) for depth in depths]
    blocks = list(block_rows(runs, depths, samples, settings.level))
    numbers = [*scalar_rows(runs, curves, settings), *centre_rows(runs, depths, samples, settings)]
    shift, reason = None, ""
    try:
        shift = measure_shift(runs, texts, tokenizer, settings, device, threads)
    except UserError as error:
        # The other measures stand without it: the reason is on the page and on the terminal.
        reason = str(error)
    else:
        blocks += shift_rows(shift, runs)
        numbers += shift_scalar_rows(shift, runs)
    found = Found(runs, curves, depths, samples, shift, reason)
    kept = ("model", "run", "seed", "scalar", "unit", "mean", "low", "high", "resolved")
    scalars = {name: [row[name] for row in numbers] for name in kept}
    facts = {**measured_on(runs, texts, settings), "alignment": shift.described if shift else None}
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "scalars.csv", to_csv(scalars))
        write_provenance(out, facts)
        build_page(found, scalars, columns(blocks), settings, str(texts), out).write(out / "depth.html")
    return [*lines(scalars), *([f"alignment: not measured: {reason}"] if reason else []), str(out / "depth.html")]
