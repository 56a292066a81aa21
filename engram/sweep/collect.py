"""Finished runs -> one tidy table, their curves, and a small copy of each run that makes `out` complete in itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram.sweep.grid import Run, unique
from engram.sweep.record import Record, columns, curve, read_record
from engram.sweep.spec import Sweep
from engram.sweep.tables import Row, axis_cell, axis_column, write_curves, write_runs, write_whole

# In the order in which they are copied: whoever finds done.json finds all of it.
SMALL_FILES = ("config.yaml", "code.json", "metrics.jsonl", "done.json")
_NAMED = 5


@dataclass(frozen=True)
class Collected:
    """What was found, each run counted once, however many parts ask for it."""

    out: Path
    done: int
    # Trained, but without a finite loss: rows with empty losses.
    failed: tuple[Run, ...]
    # Not trained yet: rows with empty losses too.
    missing: tuple[Run, ...]

    @property
    def says(self) -> str:
        text = f"{self.out / 'runs.csv'}: {self.done} of {self.done + len(self.failed) + len(self.missing)} runs"
        if self.failed:
            text += f"\nfailed, without a finite loss: {_names(self.failed)}"
        if self.missing:
            text += f"\nmissing: {_names(self.missing)}"
        return text


def collect(sweep: Sweep, runs: Sequence[Run]) -> Collected:
    """Write `out`/runs.{csv,parquet}, `out`/curves.parquet and `out`/runs/<id>/ from the pool or from earlier copies.

    Raises SweepError: a folder that holds another run than its name says, or damaged files.
    """
    once = unique(list(runs))
    found: dict[str, Record] = {}
    for run in once:
        folder = _locate(sweep, run.id)
        if folder is None:
            continue
        found[run.id] = read_record(folder, run.id)
        _keep(folder, sweep.out / "runs" / run.id)
    axes = list(dict.fromkeys(axis for run in runs for axis in run.point))
    write_runs([_row(run, found.get(run.id)) for run in runs], [axis_column(axis) for axis in axes], sweep.out)
    curves = [{"run_id": run.id, **line} for run in once if run.id in found for line in curve(found[run.id])]
    write_curves(curves, sweep.out)
    return Collected(
        out=sweep.out,
        done=sum(record.status == "done" for record in found.values()),
        failed=tuple(run for run in once if run.id in found and found[run.id].status == "failed"),
        missing=tuple(run for run in once if run.id not in found),
    )


def _locate(sweep: Sweep, run_id: str) -> Path | None:
    """Where a run lies that came to its end, the pool's before the copy, a finished one before a diverged one."""
    pool, copy = sweep.pool / run_id, sweep.out / "runs" / run_id
    for folder in (pool, copy):
        if (folder / "done.json").exists():
            return folder
    # train.py leaves this behind when a run diverges; of a diverged run, the copy has no done.json.
    if any(pool.glob("postmortem_*")):
        return pool
    return copy if (copy / "config.yaml").exists() else None


def _keep(folder: Path, copy: Path) -> None:
    if folder == copy:
        return
    for name in SMALL_FILES:
        if (folder / name).exists():
            content = (folder / name).read_bytes()
            write_whole(copy / name, _without_place(content) if name == "code.json" else content)


def _without_place(code: bytes) -> bytes:
    """Provenance without host and command: copies are published, and those tell of whoever trained the run."""
    starts = [
        {key: value for key, value in start.items() if key not in ("host", "command")}
        for start in json.loads(code)["starts"]
    ]
    return (json.dumps({"starts": starts}, indent=2) + "\n").encode()


def _row(run: Run, record: Record | None) -> Row:
    return {
        "part": run.part,
        "run_id": run.id,
        "seed": run.seed,
        "status": record.status if record else "missing",
        **{axis_column(axis): axis_cell(value) for axis, value in run.point.items()},
        **columns(record.config if record else run.config, record),
    }


def _names(runs: Sequence[Run]) -> str:
    """The first few, for people."""
    shown = [f"{run.part} {run.label}" for run in runs[:_NAMED]]
    more = f", and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
    return ", ".join(shown) + more
