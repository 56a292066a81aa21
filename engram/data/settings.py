"""The settings that decide what a prepared folder holds, and whether a folder was made with them."""

from pathlib import Path
from typing import Any

from engram.config import Config
from engram.data.errors import DataError
from engram.data.local_files import listing_digest
from engram.data.manifest import file_digest


def content_settings(config: Config) -> dict[str, Any]:
    """Flat settings, as they stand in the manifest. What names files also carries a digest; null: not there now."""
    data = config.data
    settings: dict[str, Any] = {"model.vocab_size": config.model.vocab_size}
    for index, source in enumerate(data.sources):
        prefix = f"data.sources.{index}"
        settings |= {f"{prefix}.{name}": value for name, value in source.model_dump(mode="json").items()}
        if source.path is not None:
            settings[f"{prefix}.path (names and sizes of the files)"] = listing_digest(source.path)
    tokenizer = data.tokenizer
    if tokenizer.path is None:
        settings |= {f"data.tokenizer.{name}": value for name, value in tokenizer.model_dump(mode="json").items()}
    else:
        file = Path(tokenizer.path).expanduser()
        settings["data.tokenizer.path"] = tokenizer.path
        settings["data.tokenizer.path (the file)"] = file_digest(file) if file.is_file() else None
    for name in ("validation_fraction", "split_seed", "shard_tokens"):
        settings[f"data.{name}"] = getattr(data, name)
    return settings


def check_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise DataError that tells which settings differ. Files that are gone by now are not compared."""
    names = dict.fromkeys((*found, *wanted))
    differing = [name for name in names if found.get(name) != wanted.get(name) and not _gone(name, wanted)]
    if differing:
        listed = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in differing)
        raise DataError(
            f"{folder}: was prepared with other settings: {listed}: choose another data.path, or replace the folder "
            "with python -m engram.data prepare CONFIG --force"
        )


def _gone(name: str, wanted: dict[str, Any]) -> bool:
    return name.endswith(")") and name in wanted and wanted[name] is None
