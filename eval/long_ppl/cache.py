"""An evaluator's losses on disk, under the digest of all that they depend on; thresholds are applied later."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.loading import Loaded
from eval.long_ppl.measure import Losses, Windows, short_losses, whole_losses
from eval.score_cache import checkpoint_digest

OWN_EVALUATOR = "{} is the evaluator itself: its key tokens are those that it predicts well, which favours it"
# Counts changes of how these losses are made.
VERSION = 1


def evaluator_losses(
    loaded: Loaded,
    documents: Sequence[Sequence[int]],
    windows: Windows,
    cache: Path,
    advance: Callable[[int], None] | None = None,
) -> list[Losses]:
    """Losses of each document under both contexts, from `cache` where they are known; `advance` is told of tokens."""
    key = {
        "version": VERSION,
        "evaluator": checkpoint_digest(loaded.folder),
        "documents": documents_digest(documents),
        "window": windows.window,
        "stride": windows.stride,
        "dtype": str(loaded.model.compute_dtype),
    }
    path = cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.npz"
    if not path.exists():
        device = loaded.model.head.weight.device
        short = short_losses(loaded.model, documents, windows, device=device, advance=advance)
        whole = whole_losses(loaded.model, documents, windows.window, device=device, advance=advance)
        cache.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(".unfinished.npz")
        np.savez(building, short=np.concatenate(short), whole=np.concatenate(whole))
        building.replace(path)
    bounds = np.cumsum([len(document) - windows.window for document in documents])[:-1]
    with np.load(path) as saved:
        parts = (np.split(saved[name], bounds) for name in ("short", "whole"))
        return [Losses(short, whole) for short, whole in zip(*parts, strict=True)]


def documents_digest(documents: Sequence[Sequence[int]]) -> str:
    """sha256 of the documents' tokens and bounds."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(np.asarray(document, "<i8").tobytes())
    return digest.hexdigest()
