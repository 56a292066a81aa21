"""What a folder of benchmark data holds: `manifest.json` beside the files, with the checksum of each.

data/benchmarks/<name>/  manifest.json  test.jsonl  dev.jsonl  ...   one JSON object per line
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from engram.config import Name, Settings, UserError
from engram.config_file import explain
from engram.training.files import sha256, write_atomically

MANIFEST = "manifest.json"


class DataFile(Settings):
    """A file, the split that it is (test, dev, train, ...), and which subset of the benchmark ("": all of it)."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    split: Name
    subset: str = ""


class Manifest(Settings):
    """Where the data came from and under which licence; `files` by their paths inside the folder."""

    files: Annotated[dict[Name, DataFile], Field(min_length=1)]
    licence: Name
    source: Name
    # What was changed on the way, or in which respect the data is less than the original.
    note: str = ""

    def splits(self, subset: str) -> dict[str, list[str]]:
        """Paths of the files of each split, of the subset or, where it has none of its own, of the whole benchmark."""
        found: dict[str, list[str]] = {}
        own = any(file.subset == subset for file in self.files.values())
        for path, file in self.files.items():
            if file.subset == (subset if own else ""):
                found.setdefault(file.split, []).append(path)
        return found


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError: missing, not JSON, or not as it must be."""
    path = folder / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if outside := [name for name in manifest.files if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is no file of this folder")
        return manifest
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: python -m eval add-data writes it, with the data beside it") from None
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(explain(error, Manifest))) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: is not a manifest ({error}): add the data again with python -m eval add-data"
        ) from None


def problems(folder: Path, manifest: Manifest) -> list[str]:
    """One line for each file that is missing or is not what the manifest says."""
    found = []
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: is missing")
        elif (digest := sha256(path)) != file.sha256:
            found.append(f"{path}: sha256 is {digest[:12]}..., but {MANIFEST} says {file.sha256[:12]}...")
    return found


def whole(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all as it says. Raises UserError."""
    manifest = read_manifest(folder)
    if found := problems(folder, manifest):
        raise UserError(
            "\n".join(found) + "\nnothing is evaluated on altered data: add it again (python -m eval add-data)"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n")


def data_digest(manifest: Manifest) -> str:
    """One sha256 over the checksums of all files."""
    lines = "".join(f"{file.sha256} {name}\n" for name, file in sorted(manifest.files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
