"""Tables of a study's page: what every run holds, and where it came from."""

from collections.abc import Mapping, Sequence
from html import escape

from engram.report.page import Page
from engram.sweep.spec import Part
from engram.sweep.tables import Row, axis_column
from engram.sweep.views.head import NONE, summaries
from engram.sweep.views.points import Points
from engram.sweep.views.reference import reference_point
from engram.sweep.words import signed

_COUNTED = (
    *("total", "activated", "activated_as_paper", "memory", "rho_counted"),
    *("experts", "rows", "shared_dim", "ffn_dim"),
)


def points_table(points: Points) -> tuple[list[str], list[list[str]]]:
    """Mean and sd over seeds of every point, and how many of its runs are finished."""
    table = []
    for row, found in zip(points.rows, summaries(points), strict=True):
        numbers = [NONE if number is None else f"{number:.4f}" for number in (found.mean, found.sd)]
        values = [_cell(row[axis_column(axis)]) for axis in points.axes]
        table.append([*values, *numbers, str(found.n), str(found.diverged)])
    return [*points.axes, "mean", "sd", "seeds", "diverged"], table


def counted_table(
    name: str, part: Part, rows: Sequence[Row], everything: Mapping[str, Points]
) -> tuple[list[str], list[list[str]]]:
    """Every run of part `name` with its counted parameters, and their deviation from what it is compared with."""
    points = everything[name]
    header = ["run", *points.axes, "seed", *(name.replace("_", " ") for name in _COUNTED)]
    header += ["total vs. base", "activated vs. base", "validation loss"]
    table = []
    for row in rows:
        base = base_row(row, name, part, everything)
        cells = [row["run_id"], *(_cell(row[axis_column(axis)]) for axis in points.axes), str(row["seed"])]
        cells += [_cell(row[name]) for name in _COUNTED]
        cells += [_deviation(row[name], base[name]) if base else NONE for name in ("total", "activated")]
        loss = row["val_loss"]
        table.append([*cells, row["status"] if loss is None else f"{loss:.4f}"])
    return header, table


def base_row(row: Row, name: str, part: Part, everything: Mapping[str, Points]) -> Row | None:
    """What `row` of part `name` stands beside: the part's own model without memory that resembles it most, else its
    reference. Parts may have other base models, so that no other part's is taken. None where there is none yet.
    """
    points = everything[name]
    axes = [axis_column(axis) for axis in points.axes]
    without = [candidate for candidate in points.rows if candidate["memory"] == 0]
    if without:
        return max(without, key=lambda found: sum(found.get(axis) == row.get(axis) for axis in axes))
    index = points.find({axis: row[axis_column(axis)] for axis in points.axes})
    held = None if index is None else reference_point(part, name, index, everything)
    return held[0].rows[held[1]] if held else None


def _deviation(value: float, base: float) -> str:
    return f"{signed(100 * (value / base - 1), 2)} %"


def origin_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """How many runs each commit, machine and version of torch has trained."""
    counts: dict[tuple[str, ...], int] = {}
    for row in {row["run_id"]: row for row in rows if row["status"] != "missing"}.values():
        origin = tuple(row[name] or NONE for name in ("commit", "machine", "torch"))
        counts[origin] = counts.get(origin, 0) + 1
    return ["commit", "machine", "torch", "runs"], [[*origin, str(count)] for origin, count in counts.items()]


def run_list(rows: Sequence[Row]) -> str:
    """One line for each run: id, who asks for it, and what trained it."""
    asked: dict[str, list[str]] = {}
    for row in rows:
        asked.setdefault(row["run_id"], []).append(row["part"])
    last = {row["run_id"]: row for row in rows}
    lines = [f"{'run':14}{'status':9}{'seed':>5}{'steps':>8}{'seconds':>9}  {'commit':14}parts"]
    for run_id, parts in asked.items():
        row = last[run_id]
        seconds = NONE if row["seconds"] is None else f"{row['seconds']:.0f}"
        commit = (row["commit"] or NONE)[:12]
        names = ", ".join(dict.fromkeys(parts))
        lines.append(f"{run_id:14}{row['status']:9}{row['seed']:>5}{row['steps']:>8,}{seconds:>9}  {commit:14}{names}")
    return "\n".join(lines)


def folded(page: Page, summary: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A long table that opens on a click."""
    page.html(f"<details><summary>{escape(summary)}</summary>")
    page.table(header, rows, caption)
    page.html("</details>")


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
