"""A study that is finished is not made again: its folder says of which checkpoints and with which settings it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from engram.report.page import Page
from engram.training.files import sha256, write_atomically

FINISHED = "finished.json"


@dataclass(frozen=True)
class Study:
    """What `make` writes into the folder that it is given, with its page; `identity`: all that its numbers depend on.

    `make` returns the lines for the terminal. `identity` holds only what JSON does.
    """

    name: str
    title: str
    page: str
    identity: Mapping[str, Any]
    make: Callable[[Path, Console], list[str]]


@dataclass(frozen=True)
class Made:
    """A study's page and lines; `kept`: they are from an earlier command."""

    page: Page
    lines: list[str]
    kept: bool


def made(study: Study, out: Path, console: Console) -> Made:
    """The study in `out/<name>`, taken from there if it is finished, unaltered and of the same identity."""
    folder = out / study.name
    lines = _kept(study, folder)
    if lines is not None:
        return Made(Page.read(folder / study.page), lines, True)
    # From here until the end the folder holds neither the old study nor the new one.
    (folder / FINISHED).unlink(missing_ok=True)
    lines = study.make(folder, console)
    facts = {"identity": study.identity, "page_sha256": sha256(folder / study.page), "lines": lines}
    write_atomically(folder / FINISHED, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return Made(Page.read(folder / study.page), lines, False)


def _kept(study: Study, folder: Path) -> list[str] | None:
    if not (folder / FINISHED).is_file() or not (folder / study.page).is_file():
        return None
    facts = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    same = facts["identity"] == study.identity and facts["page_sha256"] == sha256(folder / study.page)
    return list(facts["lines"]) if same else None
