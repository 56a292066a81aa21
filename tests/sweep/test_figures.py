"""Drawings: the numbers behind them are the table's, and the finding stands in them."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from engram.report.figure import SavedFigure
from engram.sweep import paper
from engram.sweep.figures.allocation import allocation_figure
from engram.sweep.figures.bars import bars_figure
from engram.sweep.figures.lines import lines_figure
from engram.sweep.figures.runs import runs_figure
from engram.sweep.figures.scaling import scaling_figure
from engram.sweep.spec import Part, Sweep
from engram.sweep.study import Study, fits
from engram.sweep.tables import Row, read_table
from engram.sweep.views.lines import lines_view
from tests.sweep.planted import SEED_LEVELS


def table(figure: SavedFigure) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(figure.csv)))


def words(figure: SavedFigure) -> str:
    """All text of the drawing, line breaks as blanks."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", figure.svg))


def numbers(lines: list[dict[str, str]], *names: str) -> list[tuple[float, ...]]:
    return [tuple(float(line[name]) for name in names) for line in lines]


def measured(rows: list[Row], part: str, *names: str, **chosen: Any) -> list[tuple[float, ...]]:
    """Numbers of a part's runs, sorted."""
    wanted = [row for row in rows if row["part"] == part and all(row[name] == value for name, value in chosen.items())]
    return sorted(tuple(row[name] for name in names) for row in wanted)


def test_allocation(study: Study, rows: list[Row], tmp_path: Path) -> None:
    view: Any = study.views["curve"]
    figure = allocation_figure(view, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"curve.{kind}" for kind in ("png", "pdf", "svg", "csv")}
    lines = table(figure)
    for budget in ("deep", "flat"):
        dots = [line for line in lines if line["curve"] == budget and line["kind"] == "measured"]
        assert sorted(numbers(dots, "rho", "seed", "loss")) == measured(
            rows, "curve", "rho_counted", "seed", "val_loss", budget=budget
        )
    dots = [line for line in lines if line["curve"] == "deep" and line["kind"] == "measured"]
    # Each seed's level over all ratios is gone, and the mean stays.
    shifted = np.array(numbers(dots, "loss_without_seed_level", "mean")).reshape(6, 3, 2)
    assert np.allclose(shifted[..., 0].mean(axis=1), shifted[:, 0, 1]) and np.ptp(shifted[..., 0].mean(axis=0)) < 1e-9
    fit = [line for line in lines if line["curve"] == "deep" and line["kind"] == "two-term"]
    rho, loss = np.array(numbers(fit, "rho", "loss")).T
    assert np.allclose(loss, view.curves[0].judged.curve.predict(rho))
    papers = [line for line in lines if line["curve"] == "paper, 6e20 FLOPs" and line["kind"] == "measured"]
    assert numbers(papers, "rho", "loss") == list(zip(*paper.allocation()["6e20"], strict=True))
    low, high = view.curves[0].band
    assert f"deep: minimum at {view.curves[0].judged.argmin:.2f} ({low:.2f} to {high:.2f})" in words(figure)
    assert "flat: not resolved" in words(figure) and "paper, 2e20 FLOPs: minimum of the fit at 0.8" in words(figure)


def test_scaling(study: Study, rows: list[Row], tmp_path: Path) -> None:
    view: Any = study.views["growth"]
    figure = scaling_figure(view, tmp_path)
    ours = [line for line in table(figure) if line["source"] == "ours" and line["kind"] == "measured"]
    engram = [line for line in ours if line["curve"] == "engram"]
    assert sorted(numbers(engram, "rows", "seed", "loss")) == [
        found for found in measured(rows, "growth", "rows", "seed", "val_loss", tables="engram") if found[0] > 0
    ]
    none = [line for line in ours if line["curve"] == "no table"]
    assert numbers(none, "rows", "seed", "loss") == [(0, seed, 5 + level) for seed, level in SEED_LEVELS.items()]
    law = [line for line in table(figure) if line["source"] == "ours" and line["kind"] == "log-linear"]
    at, loss = np.array(numbers([line for line in law if line["curve"] == "averaged"], "rows", "loss")).T
    assert np.allclose(np.diff(loss) / np.diff(np.log10(at)), -0.04)
    papers = [line for line in table(figure) if line["source"] == "paper" and line["kind"] == "measured"]
    assert numbers([line for line in papers if line["curve"] == "engram"], "rows", "loss") == list(
        zip(*paper.memory_scaling()["engram"], strict=True)
    )
    assert "engram: −0.040 nat per decade" in words(figure) and "no table" in words(figure)


def test_bars(study: Study, tmp_path: Path) -> None:
    view: Any = study.views["changes"]
    figure = bars_figure(view, tmp_path)
    lines = table(figure)
    assert [line["label"] for line in lines] == ["no memory", "no conv", "no gate"]
    assert numbers(lines, "mean", "low", "high", "paper") == [
        (bar.difference.mean, bar.difference.low, bar.difference.high, bar.paper) for bar in view.bars
    ]
    assert [line["resolved"] for line in lines] == ["True", "False", "True"]
    text = words(figure)
    assert text.count("not resolved") == 2 and f"{view.bars[1].difference.mean:+.3f}".replace("-", "−") in text
    assert "validation loss minus that of full" in text and "2 of 3 differences from full are resolved" in text


def test_lines(study: Study, rows: list[Row], tmp_path: Path) -> None:
    view: Any = study.views["place"]
    figure = lines_figure(view, tmp_path)
    lines = table(figure)
    ours = [line for line in lines if line["line"] == ""]
    assert sorted(numbers(ours, "value", "seed", "loss")) == sorted(
        (float(row["layer"]), row["seed"], row["val_loss"]) for row in rows if row["part"] == "place"
    )
    reference = [line for line in lines if line["line"] == "reference: no memory"]
    assert numbers(reference, "seed", "loss") == measured(rows, "changes", "seed", "val_loss", variant="no memory")
    papers = [line for line in lines if line["line"] == "paper"]
    assert numbers(papers, "x", "loss") == list(zip(*paper.layers(), strict=True))
    assert "Lowest at 1, 0.1" in words(figure) and "nat below no memory" in words(figure)


DRAWN = {"curve": allocation_figure, "growth": scaling_figure, "changes": bars_figure, "place": lines_figure}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Any], tuple[Figure, dict[str, list[Any]]]]:
    """Figures and their data as they are before they are saved, which takes most of the time."""
    for name in ("allocation", "scaling", "bars", "lines"):
        monkeypatch.setattr(f"engram.sweep.figures.{name}.save", lambda figure, data, *_: (figure, data))
    return lambda name, view: cast(Any, DRAWN[name])(view, tmp_path)


def texts(figure: Figure) -> list[str]:
    return [found.get_text() for found in figure.findobj(Text)]


def test_nothing_of_the_paper_where_no_part_asks_for_it(sweep: Sweep, rows: list[Row], draw: Any) -> None:
    parts = {name: part.replace(paper=None) for name, part in sweep.parts.items()}
    views = fits(sweep.replace(parts=parts), rows).views
    for name in DRAWN:
        figure, data = draw(name, views[name])
        assert "paper" not in " ".join(texts(figure))
        assert not [cell for column in data.values() for cell in column if isinstance(cell, str) and "paper" in cell]
        assert data.get("paper", [None]) == [None] * len(data.get("paper", [None]))


def test_legends_lie_outside_of_the_panels(study: Study, draw: Any) -> None:
    """Inside of one they would cover its data."""
    axes: Any = {"rho": [1, 0.5], "budget": {"deep": {}, "flat": {}}}
    part = Part(base=Path("x"), axes=axes, derive="allocation", view="lines")
    lines = lines_view("curve", part, {"curve": study.views["curve"].points})
    for name, view in [*((name, study.views[name]) for name in DRAWN), ("place", lines)]:
        figure, _ = draw(name, view)
        figure.draw_without_rendering()
        assert not any(axis.get_legend() for axis in figure.axes)
        for legend in figure.legends:
            assert all(legend.get_window_extent().y1 <= axis.get_tightbbox().y0 + 1 for axis in figure.axes)
        assert len(figure.legends) == (view is not study.views["place"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["deep", "flat"]


def test_diverged_runs_are_drawn_as_such(sweep: Sweep, rows: list[Row], draw: Any) -> None:
    table = [{**row, "status": "failed", "val_loss": None} if row["seed"] == 1 else row for row in rows]
    views = fits(sweep, table).views
    for name, label, count in [
        ("curve", "1 of 3 diverged", 12),
        ("growth", "1 of 3 diverged", 8),
        ("place", "1 of 3 diverged", 3),
        ("changes", ", 1 run diverged", 3),
    ]:
        assert sum(label in text for text in texts(draw(name, views[name])[0])) == count


def test_runs(rows: list[Row], sweep: Sweep, tmp_path: Path) -> None:
    curves: dict[str, list[Row]] = {}
    for line in read_table(sweep.out / "curves.parquet"):
        curves.setdefault(line["run_id"], []).append(line)
    chosen = [row for row in rows if row["part"] == "place"]
    figure = runs_figure("place", chosen, curves, tmp_path)
    assert figure is not None and figure.name == "place_runs"
    lines = table(figure)
    assert len(lines) == 9 * 8
    first = [line for line in lines if line["run_id"] == chosen[0]["run_id"]]
    assert numbers(first, "tokens", "val_loss") == [
        (line["tokens"], line["val_loss"]) for line in curves[chosen[0]["run_id"]]
    ]
    assert "9 runs of 8 steps" in words(figure) and "validation loss" in words(figure)
    assert runs_figure("later", [row for row in rows if row["part"] == "later"], curves, tmp_path) is None


def test_the_same_study_gives_the_same_bytes(study: Study, tmp_path: Path) -> None:
    view: Any = study.views["changes"]
    for name in ("first", "second"):
        bars_figure(view, tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
