"""One run, one folder: who may write to it, whether the config is still the same, and where the code came from.

    runs/<name>/  config.yaml  code.json  parameters.txt  metrics.jsonl  log.txt  step_000500/  latest  done.json

`latest` is a symbolic link to the newest checkpoint. This file imports no torch: a run that is finished or in use, or a
config that does not fit the folder, is reported at once.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engram.config import Config, ConfigError, UserError, load_config, save_config
from engram.config_identity import FREE, ROUNDING, within
from engram.training.files import remove_unfinished, sync, unfinished, write_atomically
from engram.training.provenance import provenance

# Characters of a setting's value in a message: a section of settings, whole.
LONGEST = 200


class RunFolderError(UserError):
    """A run folder that is in use, belongs to another config, or cannot be written."""


class RunFolder:
    """A run's folder, locked for this process while the `with` block lasts."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run_dir).expanduser()
        # Settings changed since the last start whose only effect is rounding: "train.threads: 1 -> 2".
        self.rounding_changes: list[str] = []
        self.leftovers: list[str] = []
        self._lock: int | None = None
        self._created = False

    def __enter__(self) -> Self:
        """Create or reopen the folder. Raises RunFolderError: in use, another config, not writable, not a run's."""
        try:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(parents=True)
                self._created = True
            self._refuse_other_folders()
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock()
            self._check_config()
            self.leftovers = remove_unfinished(self.path)
        except BaseException as error:
            self._remove_if_unused()
            self._release()
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or error
            raise RunFolderError(f"run_dir {self.path}: cannot be written ({reason}): choose another") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove_if_unused()
        self._release()

    @property
    def finished(self) -> dict[str, Any] | None:
        """Content of `done.json`, or None while the run has steps to go. Raises RunFolderError: damaged."""
        return self._read("done.json", "delete it, and the same command goes on from the latest checkpoint", "step")

    @property
    def finished_note(self) -> str | None:
        """What to tell whoever starts a finished run again."""
        done = self.finished
        if done is None:
            return None
        return f"{self.path} is finished after step {done['step']}: nothing to do (another run needs another run_dir)"

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as done."""
        write_atomically(self.path / "done.json", json.dumps(summary, indent=2) + "\n")

    def start(self, facts: dict[str, Any]) -> str:
        """Bind the folder to the config, put provenance and `facts` into code.json (newest first), return the run's id.

        Called once everything is ready to train: what failed before leaves the config free to be corrected.
        """
        advice = "delete it: the run goes on, without the record of its earlier starts"
        code = self._read("code.json", advice, "starts")
        try:
            earlier = code["starts"] if code else []
            run_id = earlier[-1]["run_id"] if earlier else uuid.uuid4().hex[:12]
        except (KeyError, TypeError):
            raise RunFolderError(f"{self.path / 'code.json'}: is damaged: {advice}") from None
        building = unfinished(self.path / "config.yaml")
        save_config(self.config, building)
        sync(building)
        os.replace(building, self.path / "config.yaml")
        start = {"run_id": run_id, **provenance(), **facts}
        write_atomically(self.path / "code.json", json.dumps({"starts": [start, *earlier]}, indent=2) + "\n")
        return run_id

    def _read(self, name: str, advice: str, key: str) -> dict[str, Any] | None:
        """A JSON object that holds `key`, or None where there is no such file."""
        try:
            content = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        if not isinstance(content, dict) or key not in content:
            raise RunFolderError(f"{self.path / name}: is damaged: {advice}")
        return content

    def _refuse_other_folders(self) -> None:
        names = {path.name for path in self.path.iterdir()}
        if names and not names & {"config.yaml", "lock", "latest"}:
            raise RunFolderError(
                f"run_dir {self.path}: holds files, but no run (neither config.yaml nor lock): choose a new folder"
            )

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Made by us a moment ago, and now another's.
            self._created = False
            holder = os.pread(self._lock, 200, 0).decode(errors="replace") or "another process"
            raise RunFolderError(
                f"run_dir {self.path}: in use by {holder}: wait until it ends, stop it, or choose another run_dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _remove_if_unused(self) -> None:
        """A start that failed leaves no folder behind that it made."""
        with contextlib.suppress(OSError):
            if self._created and {path.name for path in self.path.iterdir()} <= {"lock", "log.txt"}:
                shutil.rmtree(self.path)

    def _release(self) -> None:
        # Closing gives the lock back; a killed process gives it back as well.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_config(self) -> None:
        # Without its own config, a run still is what its checkpoints say.
        places = [self.path, self.path / "latest", *sorted(self.path.glob("step_*"), reverse=True)]
        path = next((place / "config.yaml" for place in places if (place / "config.yaml").exists()), None)
        if path is None:
            return
        try:
            saved = load_config(path)
        except ConfigError as error:
            raise RunFolderError(
                f"{error}\nrun_dir {self.path}: was started with a config that this code no longer reads: "
                "check out the commit in code.json, or choose another run_dir"
            ) from None
        changes = differences(saved.model_dump(mode="json"), self.config.model_dump(mode="json"))
        forbidden = [change for key, change in changes.items() if not within(key, FREE + ROUNDING)]
        if forbidden:
            raise RunFolderError(
                f"run_dir {self.path}: was started with another config:\n  "
                + "\n  ".join(forbidden)
                + "\nchoose another run_dir for the changed config, or take the change back to continue this run"
            )
        self.rounding_changes = [change for key, change in changes.items() if within(key, ROUNDING)]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> "key: old -> new" of every setting that differs between two nested dictionaries."""
    changes: dict[str, str] = {}
    for name in dict.fromkeys((*old, *new)):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= differences(before, after, key + ".")
        elif before != after:
            changes[key] = f"{key}: {_short(before)} -> {_short(after)}"
    return changes


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
