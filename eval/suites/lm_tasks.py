"""lm-eval's tasks on local data: for each, a YAML file of ours that includes its own and names the files.

Prompts, answers and metrics stay lm-eval's; nothing is fetched from a hub. Imports no lm-eval.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from engram.config import UserError
from eval.benchmarks.manifest import Manifest

OWN_TASKS = Path(__file__).parents[1] / "benchmarks" / "tasks"
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LocalTask:
    """A task as lm-eval will run it: its name there, the benchmark and subset that it is, and the file to load."""

    name: str
    benchmark: str
    subset: str
    path: Path


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's own task files. Raises UserError where lm-eval is not installed."""
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise UserError("lm-eval is missing: pip install --constraint constraints.txt --editable '.[eval]'")
    return Path(package.origin).parent / "tasks"


def task_files(pattern: str, root: Path) -> list[Path]:
    """The YAML files of tasks (groups and templates left out) that `pattern` below `root` means. Raises UserError."""
    found = [path for path in sorted(root.glob(pattern)) if "task" in (own := _keys(path)) and "group" not in own]
    if not found:
        raise UserError(f"{pattern}: no task file of this name in {root}: see lm-eval's list of tasks")
    return found


def write_tasks(
    folder: Path, benchmark: str, files: list[Path], data: Path, manifest: Manifest, shots: int
) -> list[LocalTask]:
    """One file in `folder` for each task of `files` that the manifest has data for.

    Raises UserError: no data for any of them, or no split to take few-shot examples from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        # A benchmark of one task has no subsets, whatever its hub calls its only one.
        subset = _subset(file) if len(files) > 1 else ""
        splits = manifest.splits(subset)
        if not splits:
            continue
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{benchmark}_{subset}" if subset else benchmark)
        settings = _settings(file, name, data, splits, shots)
        path = folder / f"{name}.yaml"
        # lm-eval's loader resolves functions beside the included file.
        path.write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
        written.append(LocalTask(name, benchmark, subset, path))
    if not written:
        subsets = ", ".join(sorted({file.subset for file in manifest.files.values()}))
        raise UserError(f"{data}: has no data for any task of {benchmark} (its subsets: {subsets}): add the data again")
    return written


def _settings(file: Path, name: str, data: Path, splits: dict[str, list[str]], shots: int) -> dict[str, Any]:
    included = _keys(file)
    scored = included.get("test_split") or included.get("validation_split")
    if scored not in splits:
        raise UserError(
            f"{data}: {name} is scored on the split {scored!r}, but there are only {', '.join(splits)}: add that split"
        )
    shown = (
        included.get("fewshot_split") or included.get("training_split") or included.get("validation_split") or scored
    )
    listed = "samples" in (included.get("fewshot_config") or {})
    if shots and not listed and shown not in splits:
        raise UserError(
            f"{data}: {name} takes its {shots} few-shot examples from the split {shown!r}, but there are only "
            f"{', '.join(splits)}: add that split, or set shots: 0"
        )
    settings: dict[str, Any] = {
        "include": str(file),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: [str((data / path).resolve()) for path in paths] for split, paths in splits.items()}
        },
        "num_fewshot": shots,
    }
    if shown == scored:
        # Else lm-eval does not know that a question must not be among its own examples.
        settings["fewshot_split"] = scored
    # A split that is named and not there would be asked for.
    settings |= {key: None for key in _SPLIT_KEYS if included.get(key) and included[key] not in splits}
    return settings


def _subset(file: Path) -> str:
    return str(_keys(file).get("dataset_name") or file.stem)


class _Plain(yaml.SafeLoader):
    """Reads task files without importing what their `!function` names."""


_Plain.add_constructor("!function", lambda loader, node: str(node.value))


def _keys(file: Path) -> dict[str, Any]:
    """All settings of a task file with those that it includes."""
    settings: dict[str, Any] = {}
    for path in reversed(list(_included(file))):
        settings |= yaml.load(path.read_text(encoding="utf-8"), _Plain)
    if file.parent == OWN_TASKS:
        settings.setdefault("task", file.stem)
    return settings


def _included(file: Path) -> Iterator[Path]:
    yield file
    named = yaml.load(file.read_text(encoding="utf-8"), _Plain).get("include")
    for name in [named] if isinstance(named, str) else named or []:
        yield from _included((file.parent / name).resolve())
