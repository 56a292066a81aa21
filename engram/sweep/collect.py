"""Finished runs -> one tidy table, their curves, and a small copy of each run that makes `out` complete in itself."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram.config_file import UserError
from engram.report.text import counted
from engram.sweep.grid import Run, unique
from engram.sweep.pool import Pool
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
    # Left out, with the reason: rows as of missing ones.
    damaged: tuple[tuple[Run, str], ...]
    # Parts whose runs saw different data, in words.
    mixed: tuple[str, ...]

    @property
    def says(self) -> str:
        total = self.done + len(self.failed) + len(self.missing) + len(self.damaged)
        text = f"{self.out / 'runs.csv'}: {self.done} of {counted(total, 'run')}"
        if self.failed:
            text += f"\nfailed, without a finite loss: {_names(self.failed)}"
        if self.missing:
            text += f"\nmissing: {_names(self.missing)}"
        text += "".join(f"\nwarning: {words}" for words in self.mixed)
        return text + "".join(f"\ndamaged: {run.part} {run.label}: {wrong}" for run, wrong in self.damaged)


def collect(sweep: Sweep, runs: Sequence[Run]) -> Collected:
    """Write `out`/runs.{csv,parquet}, `out`/curves.parquet and `out`/runs/<id>/ from the pool or from earlier copies.

    Runs whose files are damaged, or are another run's, are left out and named. Raises SweepError: `out` cannot be
    written.
    """
    once, pool = unique(list(runs)), Pool(sweep.pool, sweep.out)
    found: dict[str, Record] = {}
    damaged: list[tuple[Run, str]] = []
    for run in once:
        wrong = []
        for folder in _places(pool, run):
            try:
                found[run.id] = read_record(folder, run.id)
            except UserError as error:
                wrong.append(str(error))
                continue
            _keep(folder, pool.copy_folder(run))
            break
        else:
            damaged += [(run, complaint) for complaint in wrong[:1]]
    left_out = {run.id for run, _ in damaged}
    axes = list(dict.fromkeys(axis for run in runs for axis in run.point))
    write_runs([_row(run, found.get(run.id)) for run in runs], [axis_column(axis) for axis in axes], sweep.out)
    curves = [{"run_id": run.id, **line} for run in once if run.id in found for line in curve(found[run.id])]
    write_curves(curves, sweep.out)
    return Collected(
        out=sweep.out,
        done=sum(record.status == "done" for record in found.values()),
        failed=tuple(run for run in once if run.id in found and found[run.id].status == "failed"),
        missing=tuple(run for run in once if run.id not in found and run.id not in left_out),
        damaged=tuple(damaged),
        mixed=tuple(_mixed(runs, found)),
    )


def _places(pool: Pool, run: Run) -> list[Path]:
    """Where a run may lie that came to its end: the pool's before the copy, and only if none is finished, diverged."""
    if finished := pool.finished_folders(run):
        return finished
    # train.py leaves this behind when a run diverges; of a diverged run, the copy has no done.json.
    if any(pool.run_folder(run).glob("postmortem_*")):
        return [pool.run_folder(run)]
    copy = pool.copy_folder(run)
    return [copy] if (copy / "config.yaml").exists() else []


def _mixed(runs: Sequence[Run], found: Mapping[str, Record]) -> Iterator[str]:
    """A file of texts may have changed under its name: what is compared must have seen the same."""
    for part in dict.fromkeys(run.part for run in runs):
        by_data: dict[str, list[Run]] = {}
        for run in runs:
            if run.part == part and run.id in found and (data := found[run.id].data) is not None:
                by_data.setdefault(data, []).append(run)
        if len(by_data) > 1:
            groups = (f"{counted(len(group), 'run')} ({group[0].label}) {data}" for data, group in by_data.items())
            yield f"{part}: its runs saw different data, and are not to be compared: {'; '.join(groups)}"


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
        for start in json.loads(code).get("starts", [])
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
