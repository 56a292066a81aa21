"""The page of a study: the answer is on it, with its doubt, and nothing is fetched."""

import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from engram.model.accounting import count_parameters
from engram.sweep.collect import collect
from engram.sweep.grid import Run, expand
from engram.sweep.report import write
from engram.sweep.report_tables import base_row, counted_table
from engram.sweep.spec import Sweep
from engram.sweep.study import fits
from engram.sweep.tables import read_table
from tests.report.test_page import parse
from tests.sweep.planted import PARTS, make_study, plant_all, planted_loss

CHOSEN = ("curve", "changes", "later")


def unfinished(run: Run) -> float | None:
    """Of the planted runs, all but two."""
    last = run.part == "curve" and run.point["rho"] == 0.375 and run.seed == 2
    return None if last else planted_loss(run)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = make_study(tmp_path_factory.mktemp("study"), **{name: PARTS[name] for name in CHOSEN})
    runs = expand(sweep)
    plant_all(sweep.pool, runs, unfinished)
    collect(sweep, runs)
    # Of all that was trained, only the small files are at hand.
    shutil.rmtree(sweep.pool)
    return sweep


@pytest.fixture(scope="module")
def page(sweep: Sweep) -> str:
    path = write(sweep)
    assert path == sweep.out / "report.html"
    return path.read_text(encoding="utf-8")


def text(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_answer_comes_first_with_its_certainty(sweep: Sweep, page: str) -> None:
    study = fits(sweep, read_table(sweep.out / "runs.parquet"))
    view = study.views["curve"]
    assert "interior minimum at rho = " in view.findings[0]
    for finding in view.findings + study.views["changes"].findings:
        assert finding in text(page)
    tiles = page[page.index('class="tiles"') : page.index("<h2")]
    assert "experts&#x27; share at the minimum, deep" in tiles and "not resolved" in tiles
    order = ["Answers", "curve", "changes", "later", "How sure this is", "Provenance"]
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page) == order


def test_it_stands_on_its_own(page: str) -> None:
    found = parse(page).found
    assert not [tag for tag, _ in found if tag in ("script", "link", "iframe", "object")]
    places = [value for _, attributes in found for name, value in attributes.items() if name in ("src", "href")]
    assert places and all(value and value.startswith(("#", "data:")) for value in places)
    assert not re.search(r"url\((?!#)|@import", page)
    assert len([tag for tag, _ in found if tag == "svg"]) == 4


def test_what_is_missing_is_said(page: str) -> None:
    assert "Incomplete: 34 of 36 runs are finished" in text(page)
    assert "deep: 1 of 18 runs are missing" in text(page)
    assert "No run is finished yet" in text(page) and "46 of 54 runs finished, 8 missing" in text(page)


def test_every_run_stands_on_it_with_its_counts(sweep: Sweep, page: str) -> None:
    for run in expand(sweep):
        if run.part != "later":
            assert run.id in page and f"{count_parameters(run.config.model).total:,}" in page
    assert "0123456789abcdef" in page and "a processor" in page and "2.13.0" in page


def test_deviations_are_from_the_model_without_memory(sweep: Sweep) -> None:
    rows = read_table(sweep.out / "runs.parquet")
    views = {name: view.points for name, view in fits(sweep, rows).views.items()}
    own = [row for row in rows if row["part"] == "curve"]
    base = base_row(own[-1], views["curve"], views)
    assert base is not None and (base["rho"], base["budget"], base["memory"]) == (1.0, "flat", 0)
    header, table = counted_table(views["curve"], own, views)
    total = header.index("total vs. base")
    # `allocate` keeps the total within 0.5 % and the activated parameters within 1 %.
    assert {line[total] for line in table[:3]} == {"+0.00 %"}
    deviations = [(float(line[total][:-2]), float(line[total + 1][:-2])) for line in table]
    assert all(abs(first) <= 0.5 and abs(second) <= 1 for first, second in deviations)
    assert deviations[-1][1] == pytest.approx(100 * (own[-1]["activated"] / base["activated"] - 1), abs=0.005)
    assert len({first for first, _ in deviations}) > 1
    # The part without such a model of its own takes that of another.
    assert base_row(rows[-1], views["later"], views) is not None


def test_it_leaves_everything_else_in_place(sweep: Sweep, page: str) -> None:
    assert page
    names = {path.name for path in sweep.out.iterdir()}
    assert names == {"runs.csv", "runs.parquet", "curves.parquet", "fits.json", "figures", "report.html", "runs"}
    figures = {path.name for path in (sweep.out / "figures").iterdir()}
    stems = ("curve", "curve_runs", "changes", "changes_runs")
    assert figures == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "svg", "csv")}
    assert not list(Path(sweep.out).rglob(".*"))
