"""Answers of models that are kept between runs, each under the digest of all that it depends on.

lm-eval's own cache leaves the model out of its key, so that a second checkpoint gets the first one's answers.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram.config import UserError
from engram.training.checkpoint_files import CHECKSUMS
from engram.training.files import sha256
from eval.loading import Loaded

# Counts changes of what is asked of the model, or of how its answers are made.
VERSION = 1


class ScoreCache:
    """Answers (anything that JSON holds) by request in a SQLite file, for one model; `path` None keeps nothing.

    A request is any JSON value. The key is a sha256 over checkpoint, tokenizer, compute dtype, VERSION and request.
    """

    def __init__(self, path: Path | None, loaded: Loaded) -> None:
        self._identity = identity(loaded)
        self._path = path
        self._connection = None
        if path is None:
            return
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path)
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, requests: Sequence[Any]) -> dict[int, Any]:
        """Answers that are known, by the request's place. Raises UserError: a damaged file."""
        if self._connection is None:
            return {}
        found: dict[int, Any] = {}
        ask = "SELECT answer FROM answers WHERE key = ?"
        with self._explained():
            for place, request in enumerate(requests):
                if (row := self._connection.execute(ask, (self._key(request),)).fetchone()) is not None:
                    found[place] = json.loads(row[0])
        return found

    def put(self, answers: Iterable[tuple[Any, Any]]) -> None:
        """Keep pairs of request and answer. Raises UserError: a full disk, a damaged file."""
        if self._connection is None:
            return
        rows = [(self._key(request), json.dumps(answer)) for request, answer in answers]
        with self._explained(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, json.JSONDecodeError) as error:
            raise UserError(
                f"{self._path}: cannot be used as a cache ({error}): delete it, or name another file with --cache"
            ) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def remove_if_empty(self) -> None:
        """Delete the file of a closed cache that never got an answer."""
        if self._path is None or not self._path.exists():
            return
        with self._explained():
            connection = sqlite3.connect(self._path)
            (answers,) = connection.execute("SELECT EXISTS (SELECT 1 FROM answers)").fetchone()
            connection.close()
            if not answers:
                self._path.unlink()

    def _key(self, request: Any) -> str:
        return hashlib.sha256(json.dumps([self._identity, request], sort_keys=True).encode()).hexdigest()


def identity(loaded: Loaded) -> Mapping[str, Any]:
    """What tells one model's answers from another's."""
    return {
        "checkpoint": checkpoint_digest(loaded.folder),
        "tokenizer": loaded.tokenizer.digest,
        "dtype": str(loaded.model.compute_dtype),
        "version": VERSION,
    }


def checkpoint_digest(folder: Path) -> str:
    """sha256 of the file that holds the sha256 of all others."""
    return sha256(folder / CHECKSUMS)
