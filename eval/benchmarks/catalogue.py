"""The paper's benchmarks by name: `catalogue.yaml` beside this file says what each line means."""

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from engram.config import Index, Name, Settings, UserError

FOLDER = Path("data/benchmarks")


class Benchmark(Settings):
    """One row of Table 1: how the paper runs it, and with what we do."""

    name: Name
    title: Name
    shots: Index
    metric: Name
    run: Literal["harness", "own", "code", "text", "internal"]
    # YAML files of the task or of its subsets, as a pattern.
    tasks: str | None = None
    note: str = ""


@cache
def benchmarks() -> dict[str, Benchmark]:
    """All 29 by name, in the paper's order."""
    rows = yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8"))
    return {row["name"]: Benchmark(**row) for row in rows}


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The message about a name that nothing has, with the nearest that something has."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {what} {name!r}: {hint}(known: {', '.join(names)})")
