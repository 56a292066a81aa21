"""The page of a study: the answer, how sure it is, and everything that it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engram.report.figure import SavedFigure
from engram.report.page import Page
from engram.sweep.figures.allocation import allocation_figure
from engram.sweep.figures.bars import bars_figure
from engram.sweep.figures.lines import lines_figure
from engram.sweep.figures.runs import runs_figure
from engram.sweep.figures.scaling import scaling_figure
from engram.sweep.report_tables import counted_table, folded, origin_table, points_table, run_list
from engram.sweep.spec import Sweep, SweepError
from engram.sweep.study import PartView, Study, write_fits
from engram.sweep.tables import CURVE, Row, read_table
from engram.sweep.views.allocation import AllocationView
from engram.sweep.views.bars import Bars
from engram.sweep.views.lines import Lines
from engram.sweep.views.scaling import ScalingView
from engram.sweep.views.spread import LEVEL

_PAPERS_BUDGETS = "Below, the paper's two budgets (no seeds are reported), fitted by the same code. "
_PAPERS_SLOTS = "Beside it, the paper's points, fitted by the same code. "
_PAPERS_CHANGES = "Diamonds: the paper's differences for changes of these names, at its scale. "


def write(sweep: Sweep) -> Path:
    """Write `out`/report.html, `out`/figures/* and `out`/fits.json from what `collect` left in `out`."""
    study = write_fits(sweep)
    rows = read_table(sweep.out / "runs.parquet")
    curves: dict[str, list[Row]] = {}
    for line in read_table(sweep.out / "curves.parquet", CURVE):
        curves.setdefault(line["run_id"], []).append(line)
    path = sweep.out / "report.html"
    try:
        return build_page(sweep, study, rows, curves).write(path)
    except OSError as error:
        raise SweepError(f"{path}: cannot be written ({error.strerror}): give another folder as `out`") from None


def build_page(sweep: Sweep, study: Study, rows: Sequence[Row], curves: Mapping[str, Sequence[Row]]) -> Page:
    """All sections; figures and their data are written into `out`/figures."""
    page = Page(study.name, _state(rows))
    page.tiles(tile for view in study.views.values() for tile in _tiles(view))
    page.section("Answers")
    page.table(
        ["part", "finished", "finding"],
        [row for name, view in study.views.items() for row in _findings(name, view)],
    )
    for name in study.views:
        _part(page, sweep, study, name, [row for row in rows if row["part"] == name], curves)
    _certainty(page, study)
    page.section("Provenance")
    page.table(*origin_table(rows), "A commit with -modified had changes that were not committed.")
    page.details("Every run", run_list(rows))
    return page


def _findings(name: str, view: PartView) -> list[list[str]]:
    """A row for each sentence; the first names the part."""
    findings = view.findings or ["No run is finished yet"]
    return [
        [name if index == 0 else "", view.points.count.removesuffix(" runs") if index == 0 else "", text]
        for index, text in enumerate(findings)
    ]


def _part(
    page: Page, sweep: Sweep, study: Study, name: str, rows: Sequence[Row], curves: Mapping[str, Sequence[Row]]
) -> None:
    view, figures = study.views[name], sweep.out / "figures"
    page.section(name)
    for finding in view.findings:
        page.text(f"{finding}.")
    if view.points.finished < view.points.loss.size:
        page.note(f"Incomplete: {view.points.count} are finished, and what follows rests on these.")
    if not view.points.finished:
        return
    for figure, caption in figures_of(view, figures):
        page.figure(figure, caption)
    header, table = view.table()
    if table:
        page.table(header, table)
    drawing = runs_figure(name, rows, curves, figures)
    if drawing is not None:
        page.figure(drawing, "Every run of this part. Where runs have few evaluations, their training loss is shown. ")
    folded(
        page,
        f"Mean and spread of all {len(view.points.rows)} points",
        *points_table(view.points),
        "Nats per token over the finished seeds of each point; sd of single runs, with what a seed does to all points.",
    )
    everything = {part: other.points for part, other in study.views.items()}
    folded(
        page,
        f"Counted parameters of all {len(rows)} runs",
        *counted_table(name, sweep.parts[name], rows, everything),
        "Without the vocabulary's two matrices. Deviations are from the part's model without memory, else from its "
        "reference.",
    )


def figures_of(view: PartView, folder: Path) -> Iterator[tuple[SavedFigure, str]]:
    """The figure of a part, written into `folder`, and its caption."""
    pairing = f"Dots are seeds without their common level, means carry {LEVEL:.0%} intervals. "
    if isinstance(view, AllocationView):
        yield (
            allocation_figure(view, folder),
            f"{pairing}Solid: two-term fit; dashed: parabola; band: {LEVEL:.0%} interval of the minimum's place; grey "
            f"line: experts only. {_PAPERS_BUDGETS if view.paper else ''}",
        )
    elif isinstance(view, ScalingView):
        yield (
            scaling_figure(view, folder),
            f"{pairing}Solid: log-linear fit; dotted: power law with a floor; dashed grey: no table. "
            f"{_PAPERS_SLOTS if view.paper else ''}",
        )
    elif isinstance(view, Lines):
        dashed = "Dashed grey: the reference, with the range of its seeds. " if view.reference else ""
        yield lines_figure(view, folder), f"{pairing}{dashed}"
    elif isinstance(view, Bars):
        diamonds = _PAPERS_CHANGES if any(bar.paper is not None for bar in view.bars) else ""
        yield (
            bars_figure(view, folder),
            f"Differences of runs of the same seed; the {LEVEL:.0%} intervals hold for all of them at once. {diamonds}",
        )


def _tiles(view: PartView) -> Iterator[tuple[str, str]]:
    if isinstance(view, AllocationView | ScalingView):
        yield from view.tiles()


def _state(rows: Sequence[Row]) -> str:
    status = {row["run_id"]: row["status"] for row in rows}
    counts = {name: sum(value == name for value in status.values()) for name in ("done", "failed", "missing")}
    text = f"{counts['done']} of {len(status)} runs finished"
    return text + "".join(f", {counts[name]} {name}" for name in ("failed", "missing") if counts[name])


def _certainty(page: Page, study: Study) -> None:
    page.section(
        "How sure this is",
        f"All intervals hold with {LEVEL:.0%}. Runs of one seed see the same batches in the same order, so that "
        "differences are taken within seeds; a bootstrap over seeds gives the place of a minimum and a slope. They "
        "cover the choice of seed and nothing else: not the corpus, not the model's size. Differences from a reference "
        "hold all at once (Dunnett), and so does what is not resolved from the lowest point (Tukey): of points that "
        f"are equal, in {LEVEL:.0%} of cases none is taken for better or worse, however many there are and whichever "
        "is picked. Both take one noise for all points of a part; where a difference's own seeds scatter by more, its "
        "own interval (Student's t) stands. The largest table's difference from none, and the error bars of single "
        "points, are each on their own.",
    )
    rows = []
    for name, view in study.views.items():
        notes = view.warnings()
        rows.append([name, view.points.count, str(len(view.points.seeds)), "; ".join(notes) or "none"])
    page.table(["part", "finished", "seeds", "warnings"], rows)
