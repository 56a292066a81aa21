"""What a study says: each part read as its view asks, from the table alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from engram.sweep.spec import Sweep
from engram.sweep.tables import Row, read_table, write_whole
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


def fits(sweep: Sweep, rows: Sequence[Row]) -> Study:
    """Fits of all parts. Raises SweepError: a reference that does not exist, or a view without the axis it needs."""
    everything = {name: points(rows, name, part.axes) for name, part in sweep.parts.items()}
    views: dict[str, PartView] = {}
    for name, part in sweep.parts.items():
        shown = part.shown_as
        if shown == "allocation":
            views[name] = allocation_view(name, everything[name])
        elif shown == "scaling":
            views[name] = scaling_view(name, everything[name])
        else:
            views[name] = (lines_view if shown == "lines" else bars_view)(name, part, everything)
    return Study(sweep.name, views)


def write_fits(sweep: Sweep) -> Study:
    """Fit what `collect` wrote, and write `out`/fits.json."""
    study = fits(sweep, read_table(sweep.out / "runs.parquet"))
    text = json.dumps(study.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(sweep.out / "fits.json", text.encode())
    return study


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
