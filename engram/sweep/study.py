"""What a study says: each part read as its view asks, from the table alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from engram.sweep.grid import Run, expand
from engram.sweep.spec import Part, Sweep, SweepError, View
from engram.sweep.tables import WHAT, WHO, Row, axis_cell, axis_column, read_table, write_whole
from engram.sweep.views.allocation import allocation_view
from engram.sweep.views.bars import bars_view
from engram.sweep.views.lines import lines_view
from engram.sweep.views.points import Points, points
from engram.sweep.views.scaling import scaling_view


class PartView(Protocol):
    """What all views have in common."""

    @property
    def points(self) -> Points: ...

    @property
    def findings(self) -> list[str]:
        """What it comes to, a sentence for each curve."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        ...

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of what was fitted."""
        ...

    def warnings(self) -> list[str]:
        """What makes it less certain than its intervals say."""
        ...


@dataclass(frozen=True)
class Study:
    """Each part of a sweep and what it says."""

    name: str
    views: dict[str, PartView]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parts": {name: view.as_dict() for name, view in self.views.items()}}


_VIEWS: dict[View, Callable[[str, Part, Mapping[str, Points]], PartView]] = {
    "allocation": allocation_view,
    "scaling": scaling_view,
    "bars": bars_view,
    "lines": lines_view,
}


def fits(sweep: Sweep, rows: Sequence[Row]) -> Study:
    """Fits of all parts. Raises SweepError: a reference that does not exist, or a view without the axis it needs."""
    everything = {name: points(rows, name, part.axes) for name, part in sweep.parts.items()}
    views: dict[str, PartView] = {}
    for name, part in sweep.parts.items():
        views[name] = _VIEWS[part.shown_as](name, part, everything)
    return Study(sweep.name, views)


def write_fits(sweep: Sweep) -> Study:
    """Fit what `collect` wrote, and write `out`/fits.json. Raises SweepError: it wrote the runs of another sweep."""
    path = sweep.out / "runs.parquet"
    rows, runs = read_table(path, [*WHO, *WHAT]), expand(sweep)
    different = [run for run, row in zip(runs, rows, strict=False) if not _is_row_of(row, run)]
    if different or len(rows) != len(runs):
        first = f", first {different[0].part} {different[0].label}" if different else ""
        raise SweepError(
            f"{path}: holds {len(rows)} rows, which are not the {len(runs)} runs of the sweep as it stands now{first}: "
            "its file or its base has changed, run `collect` again"
        )
    study = fits(sweep, rows)
    text = json.dumps(study.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(sweep.out / "fits.json", text.encode())
    return study


def _is_row_of(row: Row, run: Run) -> bool:
    # A column of mixed values is text.
    cells = {axis_column(axis): axis_cell(value) for axis, value in run.point.items()}
    return (row["part"], row["run_id"], row["seed"]) == (run.part, run.id, run.seed) and all(
        row.get(name) in (cell, str(cell)) for name, cell in cells.items()
    )


def print_fits(study: Study, console: Console) -> None:
    """One table for each part, and the sentence that it comes to."""
    for name, view in study.views.items():
        console.print(f"\n{name}", style="bold", end="", markup=False)
        console.print(f" ({view.points.count})", markup=False, highlight=False)
        for finding in view.findings:
            console.print(f"  {finding}", markup=False, highlight=False)
        header, rows = view.table()
        if rows:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for index, column in enumerate(header):
                table.add_column(column, justify="left" if index == 0 else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
