"""Runs that diverged: counted and said in every view, and never a reason to call their point better."""

from pathlib import Path

import numpy as np

from engram.sweep.spec import Part, Sweep
from engram.sweep.study import fits
from engram.sweep.tables import Row
from engram.sweep.views.allocation import AllocationView
from engram.sweep.views.bars import Bars, bars_view
from engram.sweep.views.lines import Lines, lines_view
from engram.sweep.views.points import Points, points
from tests.sweep.planted import table_row


def test_diverged_runs_are_counted_and_said_and_flatter_nothing(sweep: Sweep, rows: list[Row]) -> None:
    """The seeds that went well of each of these points are its best ones, or make it the best point of all."""

    def lost(row: Row) -> bool:
        return row["seed"] == 1 and any(
            (
                row["part"] == "curve" and row["budget"] == "deep" and row["rho"] == 0.625,
                row["part"] == "growth" and row["tables"] == "engram" and row["axis.rows"] == 4000,
                row["part"] == "changes" and row["variant"] == "no gate",
                row["part"] == "place" and row["layer"] == "1",
            )
        )

    table = [{**row, "status": "failed", "val_loss": None} if lost(row) else dict(row) for row in rows]
    for row in table:
        if row["part"] == "changes" and row["variant"] == "no gate" and row["val_loss"]:
            row["val_loss"] -= 1
    study = fits(sweep, table)
    where = {"curve": "deep, 0.625", "growth": "engram, 4000", "changes": "no gate", "place": "1"}
    for name, label in where.items():
        view = study.views[name]
        assert any(text.startswith(f"1 run diverged (1 of 3 at {label}): ") for text in view.findings), view.findings
        assert "1 run diverged" in view.warnings() and not any("missing" in note for note in view.warnings())
        assert "diverged" in str(view.table())
        written = view.as_dict()
        assert written["diverged"] == 1
        (point,) = [point for point in written["points"] if point["diverged"]]
        assert (point["label"], point["n"], point["diverged"]) == (label, 2, 1)
    curve, changes, place = (study.views[name] for name in ("curve", "changes", "place"))
    assert isinstance(curve, AllocationView) and isinstance(changes, Bars) and isinstance(place, Lines)
    assert curve.table()[1][1] == ["diverged at", f"{curve.curves[0].rho[2]:.2f} (1)", "none"]
    assert curve.curves[0].judged is not None and curve.curves[0].judged.best != curve.curves[0].rho[2]
    (better,) = [bar for bar in changes.bars if bar.label == "no gate"]
    assert better.difference is not None and better.difference.resolved and better.difference.mean < -0.9
    assert not better.resolved and "the largest: no memory" in changes.findings[0]
    assert place.contests[0].best == "0"


def test_a_reference_that_diverged_makes_nothing_worse() -> None:
    losses = {"a": [3.0, 3.1, None], "b": [3.5, 3.6, 3.4], "c": [2.5, 2.6, 2.4]}
    table = [table_row("p", seed, loss, v=v) for v, row in losses.items() for seed, loss in enumerate(row)]
    part = Part(base=Path("x"), axes={"v": {"a": {}, "b": {}, "c": {}}}, view="bars")
    view = bars_view("p", part, {"p": points(table, "p", part.axes)})
    assert [(bar.label, bar.resolved) for bar in view.bars] == [("b", False), ("c", True)]


def test_lines_without_a_finished_run_say_nothing() -> None:
    part = Part(base=Path("x"), axes={"v": {"a": {}, "b": {}}}, view="lines", reference={"v": "a"})
    table = [table_row("p", 0, None, v=v) for v in ("a", "b")]
    view = lines_view("p", part, {"p": points(table, "p", part.axes)})
    assert view.contests == () and view.findings[0].startswith("2 runs diverged (1 of 1 at a, 1 of 1 at b)")


def test_the_lowest_point_is_none_of_which_a_run_diverged() -> None:
    """Of the only seed that all have, 0 is the lowest."""
    loss = np.array([[1.0, np.inf], [2.0, np.nan], [3.0, np.nan], [4.0, 4.0]])
    rows = tuple({"x": index} for index in range(4))
    assert Points(("x",), rows, (7, 8), loss).lowest() == 1
    assert Points(("x",), rows[:1], (7, 8), loss[:1]).lowest() == 0
