"""One page with every study of one or two recipes, each study's files in a folder beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engram.config import UserError
from engram.model.accounting import count_parameters, rho
from engram.report.page import Page
from engram.report.text import short
from engram.training.files import write_atomically
from engram.training.provenance import origin
from eval.output import writing_into
from eval.score_cache import checkpoint_digest
from eval.sided_table import side_names
from eval.sides import Run
from eval.studies.kept import Made, Study, made
from eval.studies.plan import Plan, Wanted, plan

NAME = "index.html"


def write_studies(sides: dict[str, Sequence[str]], wanted: Wanted, out: Path, console: Console) -> list[str]:
    """Make the studies that are not finished in `out` yet, and the page of all; -> lines for the terminal.

    A study that cannot be made on these models costs a note on the page and the console, not the page. Raises
    UserError: what all studies need is missing, `out` cannot be written, or no study could be made.
    """
    found = plan(sides, wanted)
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        return _write(found, out, console)


def _write(found: Plan, out: Path, console: Console) -> list[str]:
    finished: list[tuple[Study, Made]] = []
    notes, states = list(found.left_out), {}
    for place, study in enumerate(found.studies, 1):
        count = f"{place}/{len(found.studies)} {study.name}"
        console.print(count, markup=False, highlight=False)
        try:
            one = made(study, out, console)
        except UserError as error:
            states[study.name] = f"not made: {error}"
            notes.append(f"{study.title}: not made: {error}")
            console.print(notes[-1], style="yellow", markup=False, highlight=False, soft_wrap=True)
            continue
        states[study.name] = "kept" if one.kept else "made"
        if one.kept:
            kept = f"{study.name}: finished earlier from these checkpoints and options; kept (delete {out / study.name}"
            console.print(f"{kept} to make it again)", markup=False, highlight=False, soft_wrap=True)
        finished.append((study, one))
    if not finished:
        raise UserError("no study could be made: " + " | ".join(states.values()))
    page = _opening(found.runs)
    for note in notes:
        page.note(note)
    for study, one in finished:
        page.chapter(study.title, one.page)
    facts = {**origin(), "studies": states, "options": dict(found.studies[0].identity["options"])}
    text = json.dumps(facts, indent=1) + "\n"
    page.section("Provenance", "Every study's folder holds its figures (PNG, PDF, SVG), tables and own provenance.")
    page.details("This page", text)
    write_atomically(out / "provenance.json", text)
    page.write(out / NAME)
    # Studies end with the names of their files.
    lines = [f"{study.name}: {line}" for study, one in finished for line in one.lines if str(out) not in line]
    return [*lines, str(out / NAME)]


def _opening(runs: Sequence[Run]) -> Page:
    """What is compared."""
    page = Page(" and ".join(side_names(runs)), "All studies of these checkpoints on one page.")
    page.section("Checkpoints", "rho: the routed experts' share of the parameters that a token leaves unused.")
    rows = []
    for run in runs:
        counts = count_parameters(run.config.model)
        sizes = (counts.total, counts.activated, counts.memory)
        digest = checkpoint_digest(run.folder)[:12]
        rows.append(
            (
                run.side,
                run.folder,
                digest,
                f"{run.step:,}",
                run.seed,
                f"{rho(run.config.model):.3f}",
                *map(short, sizes),
            )
        )
    header = ("", "checkpoint", "sha256", "step", "seed", "rho", "total", "activated", "in tables")
    page.table(header, rows, "Parameters without the vocabulary's two matrices.")
    return page
