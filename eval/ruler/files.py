"""Samples on disk: a JSONL file for each task and length, and a manifest that says what they were made of."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram.data.tokenizer import Tokenizer
from engram.training.files import sha256, write_atomically
from eval.ruler.sample import Sample, Task, sample
from eval.ruler.tasks import Sources

MANIFEST = "manifest.json"
# Counts changes of what a sample of given settings is.
VERSION = 2


def settings(
    profile: str,
    tasks: Mapping[str, Task],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    digest: str,
    given: Sources,
) -> dict[str, Any]:
    """All that samples depend on; `digest` is the tokenizer's."""
    files = {name: None if source is None else source.sha256 for name, source in vars(given).items()}
    return {
        "version": VERSION,
        "profile": profile,
        "tasks": {name: task.haystack for name, task in tasks.items()},
        "lengths": list(lengths),
        "samples": samples,
        "seed": seed,
        "tokenizer": digest,
        "sources": files,
    }


def make_samples(
    folder: Path,
    tasks: Mapping[str, Task],
    tokenizer: Tokenizer,
    wanted: Mapping[str, Any],
    advance: Callable[[int], None] | None = None,
) -> list[Sample]:
    """The samples that `wanted` (see `settings`) describes: read from `folder` where it holds them, else written there.

    Raises UserError where a sample does not fit, before anything is written.
    """
    if (found := _read(folder, wanted)) is not None:
        return found
    made: dict[str, list[Sample]] = {}
    for name, task in tasks.items():
        for length in wanted["lengths"]:
            made[f"{name}_{length}.jsonl"] = [
                sample(task, tokenizer, length, wanted["seed"], index) for index in range(wanted["samples"])
            ]
            if advance is not None:
                advance(wanted["samples"])
    folder.mkdir(parents=True, exist_ok=True)
    # Without its manifest, a folder half rewritten counts as none.
    (folder / MANIFEST).unlink(missing_ok=True)
    digests = {}
    for file, samples in made.items():
        text = "".join(json.dumps(asdict(one)) + "\n" for one in samples)
        write_atomically(folder / file, text)
        digests[file] = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(folder / MANIFEST, json.dumps({**wanted, "files": digests}, indent=1) + "\n")
    return [one for samples in made.values() for one in samples]


def _read(folder: Path, wanted: Mapping[str, Any]) -> list[Sample] | None:
    """Samples of exactly these settings, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest.pop("files")
        if manifest != wanted or any(sha256(folder / name) != digest for name, digest in files.items()):
            return None
        lines = [line for name in files for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    return [_sample(json.loads(line)) for line in lines]


def _sample(fields: dict[str, Any]) -> Sample:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Sample(**values)
