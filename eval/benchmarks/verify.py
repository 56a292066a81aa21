"""Which of the paper's benchmarks can be run here: those whose data is in data/benchmarks, byte by byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engram.config import UserError
from eval.benchmarks.catalogue import Benchmark, benchmarks
from eval.benchmarks.manifest import problems, read_manifest
from eval.benchmarks.packages import PACKAGES

Status = Literal["present", "missing", "altered", "unobtainable", "with every run"]


@dataclass(frozen=True)
class Finding:
    """One benchmark's state; `detail` says what is wrong, or what to do."""

    name: str
    title: str
    status: Status
    detail: str


def verify(folder: Path) -> list[Finding]:
    """The paper's 29 in its order, then whatever else lies in the folder."""
    known = benchmarks()
    others = [path.name for path in sorted(folder.glob("*")) if path.is_dir() and path.name not in known]
    return [_paper(folder, one) for one in known.values()] + [_data(folder / name, name, name) for name in others]


def _paper(folder: Path, benchmark: Benchmark) -> Finding:
    name, title = benchmark.name, benchmark.title
    if benchmark.run == "internal":
        return Finding(name, title, "unobtainable", benchmark.note)
    if name == "validation":
        return Finding(name, title, "with every run", benchmark.note)
    return _data(folder / name, name, title)


def _data(folder: Path, name: str, title: str) -> Finding:
    if not folder.is_dir():
        if name in PACKAGES:
            return Finding(name, title, "missing", f"python -m eval add-data {name}")
        return Finding(name, title, "missing", f"bring it: add-data {name} --file SPLIT=FILE")
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return Finding(name, title, "altered", str(error))
    found = problems(folder, manifest)
    if found:
        return Finding(name, title, "altered", "; ".join(found))
    files = f"{len(manifest.files)} file{'s' if len(manifest.files) > 1 else ''}"
    return Finding(name, title, "present", f"{files}, {manifest.licence}, from {manifest.source}")
