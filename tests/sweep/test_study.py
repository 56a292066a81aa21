"""The table -> what a study says: planted optima, slopes and differences come back, and doubt is said in words."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from engram.sweep import paper
from engram.sweep.paired import paired_difference
from engram.sweep.simultaneous import differences
from engram.sweep.spec import Part, Sweep, SweepError
from engram.sweep.study import Study, fits, print_fits, write_fits
from engram.sweep.tables import Row
from engram.sweep.views.allocation import AllocationView
from engram.sweep.views.bars import Bars, bars_view
from engram.sweep.views.lines import Lines, lines_view
from engram.sweep.views.points import Points, points
from engram.sweep.views.scaling import ScalingView
from engram.sweep.views.spread import spread
from engram.sweep.words import compared, interval, signed
from tests.sweep.planted import LAYERS, NOISE, SEED_LEVELS, VARIANTS, deep, table_row


def only(sweep: Sweep, *names: str) -> Sweep:
    return sweep.replace(parts={name: sweep.parts[name] for name in names})


def without(rows: list[Row], leave_out: Callable[[Row], bool]) -> list[Row]:
    """The same table where some runs are not finished."""
    return [{**row, "status": "missing", "val_loss": None} if leave_out(row) else row for row in rows]


def test_the_planted_optimum_is_found_and_a_flat_curve_is_not_resolved(study: Study) -> None:
    view = study.views["curve"]
    assert isinstance(view, AllocationView)
    found, flat = view.curves
    grid = np.linspace(0.375, 1, 2001)
    best = grid[np.argmin([deep(share) for share in grid])]
    assert found.judged is not None and found.judged.verdict == "interior minimum"
    assert found.judged.argmin == pytest.approx(best, abs=0.04)
    low, high = found.band or (math.nan, math.nan)
    assert low - 0.02 <= best <= high + 0.02 and 0 < high - low < 0.3
    gain = deep(1.0) - deep(best)
    assert found.judged.regret_moe and found.judged.regret_moe.loss == pytest.approx(gain, abs=3 * NOISE)
    assert found.title == f"minimum at {found.judged.argmin:.2f} ({low:.2f} to {high:.2f}), " + (
        f"{found.judged.regret_moe.loss:.3f} nat below experts only"
    )
    assert flat.judged is not None and flat.judged.verdict == "not resolved"
    assert flat.band is None and flat.title.startswith("not resolved")
    assert [pair[:2] for pair in view.moves] == [("deep", "flat")] and view.moves[0][2].verdict == "not resolved"
    assert dict(view.tiles())["not resolved"] == "experts' share at the minimum, flat"


def test_curves_stand_at_the_ratios_that_were_counted(study: Study) -> None:
    view = study.views["curve"]
    assert isinstance(view, AllocationView)
    curve = view.curves[0]
    assert curve.rho == tuple(sorted(curve.rho)) and curve.rho[-1] == 1 and curve.pure == len(curve.rho) - 1
    assert curve.points.axis("rho") == [0.375, 0.5, 0.625, 0.75, 0.875, 1]
    # Whole experts, and dense widths in steps, come near the ratio that was asked for.
    assert np.allclose(curve.rho, curve.points.axis("rho"), atol=0.02) and curve.rho[0] != 0.375


def test_the_planted_slope_and_offset_are_found(study: Study) -> None:
    view = study.views["growth"]
    assert isinstance(view, ScalingView)
    first, second = view.curves
    assert (first.name, second.name) == ("engram", "averaged") and len(first.rows) == 4 and 0 not in first.rows
    assert first.scaling is not None and second.scaling is not None
    assert first.scaling.per_decade == pytest.approx(0.04, abs=1e-9)
    assert view.baseline == pytest.approx([5 + level for level in SEED_LEVELS.values()])
    assert first.gain is not None and first.gain.mean == pytest.approx(-0.04 * math.log10(first.rows[-1]), abs=1e-9)
    assert [name for name, _ in view.offsets] == ["averaged"]
    assert view.offsets[0][1].loss == pytest.approx(0.03, abs=1e-9)
    assert "−0.040 nat per decade" in view.title
    assert "averaged lies 0.030 nat above engram (+0.030 to +0.030): it needs 5.6 times the rows" in view.findings[-1]
    # 10 ** (0.03 / 0.04)
    assert view.offsets[0][1].rows_factor == pytest.approx(10**0.75)


def test_differences_are_paired_by_seed(study: Study, rows: list[Row]) -> None:
    view = study.views["changes"]
    assert isinstance(view, Bars)
    assert [bar.label for bar in view.bars] == ["no memory", "no conv", "no gate"] and view.reference == "full"
    losses = {(row["variant"], row["seed"]): row["val_loss"] for row in rows if row["part"] == "changes"}
    for bar in view.bars:
        assert bar.difference is not None and bar.difference.n == 3
        exact = np.mean([losses[bar.label, seed] - losses["full", seed] for seed in SEED_LEVELS])
        assert bar.difference.mean == pytest.approx(exact, abs=1e-12)
        assert bar.difference.mean == pytest.approx(VARIANTS[bar.label], abs=4 * NOISE)
        assert bar.paper == paper.ablations()[bar.label]
    # Seeds lie 0.08 apart: unpaired, none of these would be resolved.
    resolved = {bar.label: bar.difference and bar.difference.resolved for bar in view.bars}
    assert resolved == {"no memory": True, "no conv": False, "no gate": True}
    assert view.findings[0].startswith("2 of 3 differences from full are resolved; the largest: no memory, +0.1")


def test_differences_hold_for_all_points_of_a_part_at_once(study: Study) -> None:
    """The reference's runs count once among them, also where it lies in another part."""
    changes, place = study.views["changes"], study.views["place"]
    assert isinstance(changes, Bars) and isinstance(place, Lines)
    loss = changes.points.loss
    assert [bar.difference for bar in changes.bars] == differences(loss, [(index, 0) for index in (1, 2, 3)])
    beside = np.vstack([place.points.loss, loss[changes.points.axis("variant").index("no memory")]])
    gain, expected = place.contests[0].gain, differences(beside, [(index, 3) for index in (0, 1, 2)])[1]
    assert gain and expected and (gain.low, gain.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_lines_name_the_best_and_compare_with_another_parts_reference(study: Study) -> None:
    view = study.views["place"]
    assert isinstance(view, Lines)
    (contest,) = view.contests
    assert contest.lines[0].x == (0, 1, 2) and contest.best == "1" and contest.tied == ()
    assert contest.gain is not None and contest.gain.resolved
    assert contest.gain.mean == pytest.approx(LAYERS["1"] - VARIANTS["no memory"], abs=4 * NOISE)
    assert view.reference == "no memory" and "nat below no memory" in view.findings[0]


def test_lines_far_apart_are_read_on_their_own() -> None:
    def row(length: str, lr: float, loss: float) -> Row:
        return table_row("p", 0, loss, length=length) | {"optim.lr": lr}

    part = Part(base=Path("x"), axes={"optim.lr": [0.1, 0.2], "length": {"short": {}, "long": {}}}, view="lines")

    def view(gap: float) -> Lines:
        table = [
            row("short", 0.1, 5.0),
            row("long", 0.1, 5.2 - gap),
            row("short", 0.2, 5.1),
            row("long", 0.2, 5.1 - gap),
        ]
        return lines_view("p", part, {"p": points(table, "p", part.axes)})

    assert view(2.0).findings == [
        "short: lowest at 0.1 (one seed: not resolved)",
        "long: lowest at 0.2 (one seed: not resolved)",
    ]
    (near,) = view(0.15).contests
    assert [line.name for line in near.lines] == ["short", "long"] and near.best == "0.2 (long)"


def test_a_point_is_not_compared_with_itself() -> None:
    """The reference lies on the line, or is the same run in another part."""
    losses = {"a": [3.0, 3.2], "b": [3.003, 3.199], "c": [3.5, 3.7]}
    own = [table_row("p", seed, loss, v=v) for v, both in losses.items() for seed, loss in enumerate(both)]
    other = [table_row("q", seed, loss, v=v, w="x") for v, both in losses.items() for seed, loss in enumerate(both)]
    axes: Any = {"v": {"a": {}, "b": {}, "c": {}}}
    everything = {"p": points(own, "p", axes), "q": points(other, "q", [*axes, "w"])}
    for reference in ({"v": "a"}, {"part": "q", "v": "a", "w": "x"}):
        part = Part(base=Path("x"), axes=axes, view="lines", reference=reference)
        view = lines_view("p", part, everything)
        (contest,) = view.contests
        assert contest.gain is None and contest.tied == ("b",)
        assert view.findings == ["lowest at a, the reference itself; not resolved from b"]
        bars = bars_view("p", part, everything)
        assert [bar.label for bar in bars.bars] == ["b", "c"]
    (contest,) = lines_view("p", part.replace(reference={"v": "b"}), everything).contests
    # That a lies below b is said once, with its interval.
    assert contest.gain is not None and not contest.gain.resolved and contest.tied == ()


def test_the_best_of_many_lines_is_compared_with_all_at_once() -> None:
    """Noise alone, 12 points of 3 seeds: each on its own, some would pass for worse in most draws."""
    part = Part(base=Path("x"), axes={"v": {str(v): {} for v in range(12)}}, view="lines")
    some = 0
    for _ in range(20):
        losses = np.random.normal(4, 0.01, (12, 3))
        table = [table_row("p", seed, loss, v=str(v)) for v, row in enumerate(losses) for seed, loss in enumerate(row)]
        (contest,) = lines_view("p", part, {"p": points(table, "p", part.axes)}).contests
        some += len(contest.tied) < 11
    assert some <= 5


def test_means_and_spreads_of_points(study: Study, rows: list[Row]) -> None:
    written = study.views["changes"].as_dict()["points"]
    for point in written:
        losses = [row["val_loss"] for row in rows if row["part"] == "changes" and row["variant"] == point["label"]]
        assert (point["mean"], point["sd"]) == pytest.approx((np.mean(losses), np.std(losses, ddof=1)))
        assert (point["n"], point["diverged"]) == (3, 0)
    header, table = study.views["place"].table()
    first = [row["val_loss"] for row in rows if row["part"] == "place" and row["layer"] == "0"]
    assert header == ["layer", "0", "1", "2"]
    assert table[0][:2] == ["mean ± sd (seeds)", f"{np.mean(first):.4f} ± {np.std(first, ddof=1):.4f} (3)"]
    empty = {"label": "0.5", "mean": None, "sd": None, "n": 0, "diverged": 0}
    assert study.views["later"].as_dict()["points"][0] == empty


def test_ranges_of_small_cost_stand_in_fits_and_table(study: Study) -> None:
    view = study.views["curve"]
    assert isinstance(view, AllocationView) and view.curves[0].judged is not None
    ranges = view.as_dict()["curves"][0]["fit"]["within"]
    assert [near["nat"] for near in ranges] == [0.005, 0.01, 0.02]
    cells = {row[0]: row[1] for row in view.table()[1]}
    for near in ranges:
        assert near["low"] <= view.curves[0].judged.argmin <= near["high"]
        low, high = near["low_interval"], near["high_interval"]
        assert cells[f"within {near['nat']:g} of it"] == (
            f"{near['low']:.2f} ({low[0]:.2f} to {low[1]:.2f}) to {near['high']:.2f} ({high[0]:.2f} to {high[1]:.2f})"
        )


def test_the_tile_of_a_slope_says_when_it_is_not_resolved(sweep: Sweep, rows: list[Row], study: Study) -> None:
    view = study.views["growth"]
    assert isinstance(view, ScalingView)
    tiles = list(view.tiles())
    assert tiles[0] == ("−0.040 nat", "for ten times the rows, engram (−0.040 to −0.040)")
    # Four sizes are too few to tell laws apart.
    assert tiles[1] == ("not resolved", "law of the loss over rows, engram")
    noise = {row["run_id"]: float(np.random.normal(0, 0.2)) for row in rows}
    noisy = [{**row, "val_loss": row["val_loss"] and row["val_loss"] + noise[row["run_id"]]} for row in rows]
    one = without(rows, lambda row: row["seed"] > 0)
    for table in (noisy, one):
        view = fits(only(sweep, "growth"), table).views["growth"]
        assert isinstance(view, ScalingView)
        assert next(view.tiles()) == ("not resolved", "what ten times the rows change, engram")


def test_warnings_of_distances_are_not_lost(sweep: Sweep, rows: list[Row]) -> None:
    cut = without(rows, lambda row: row["tables"] == "averaged" and row["seed"] == 2 and row["axis.rows"] > 0)
    view = fits(only(sweep, "growth"), cut).views["growth"]
    assert any(note.startswith("averaged: the two models have finished different seeds") for note in view.warnings())


def test_the_papers_points_stand_only_where_a_part_asks_for_them(sweep: Sweep, rows: list[Row]) -> None:
    """Whatever its variants and axes are called."""
    parts = {name: part.replace(paper=None) for name, part in sweep.parts.items()}
    curve, growth, changes, place = list(fits(sweep.replace(parts=parts), rows).views.values())[:4]
    assert isinstance(curve, AllocationView) and isinstance(growth, ScalingView)
    assert isinstance(changes, Bars) and isinstance(place, Lines)
    assert curve.paper == () and growth.paper is None and place.paper is None
    assert [bar.paper for bar in changes.bars] == [None] * 3 and "paper" not in changes.table()[0]


def test_what_is_missing_is_said(sweep: Sweep, rows: list[Row]) -> None:
    cut = without(rows, lambda row: row["part"] == "curve" and row["seed"] == 2 and row["rho"] < 0.6)
    view = fits(only(sweep, "curve"), cut).views["curve"]
    assert isinstance(view, AllocationView)
    assert view.points.count == "32 of 36 runs" and view.curves[0].points.count == "16 of 18 runs"
    assert view.curves[0].judged is not None and view.curves[0].judged.verdict == "interior minimum"
    assert "deep: 2 of 18 runs are missing" in view.warnings()
    few = without(rows, lambda row: row["part"] == "curve" and row["rho"] < 0.8)
    view = fits(only(sweep, "curve"), few).views["curve"]
    assert isinstance(view, AllocationView) and view.curves[0].judged is None
    assert view.findings[0] == "deep: 6 of 18 runs, 3 ratios are needed for a curve"


def test_a_reference_that_is_not_finished_leaves_no_bar(sweep: Sweep, rows: list[Row]) -> None:
    changes = only(sweep, "changes")
    view = fits(changes, without(rows, lambda row: row["variant"] == "full")).views["changes"]
    assert isinstance(view, Bars) and not view.measured
    assert view.findings == ["no finished run beside its reference yet"]
    one = fits(changes, without(rows, lambda row: row["part"] == "changes" and row["seed"] > 0)).views["changes"]
    assert one.findings == ["one seed: no difference from full is resolved"]


def test_an_empty_study_says_so_everywhere(sweep: Sweep, rows: list[Row]) -> None:
    empty = fits(sweep, without(rows, lambda row: True))
    json.dumps(empty.as_dict(), allow_nan=False)
    assert {name: view.points.finished for name, view in empty.views.items()} == dict.fromkeys(sweep.parts, 0)
    assert empty.views["place"].findings == []
    # Collected before the part was added to the sweep.
    assert fits(sweep, []).views["changes"].findings == ["no finished run beside its reference yet"]


def test_fits_are_written_as_plain_json_and_printed(sweep: Sweep) -> None:
    study = write_fits(sweep)
    written = json.loads((sweep.out / "fits.json").read_text())
    assert written == json.loads(json.dumps(study.as_dict()))
    assert written["parts"]["curve"]["curves"][0]["fit"]["verdict"] == "interior minimum"
    assert written["parts"]["changes"]["bars"][0]["difference"]["n"] == 3
    assert (written["parts"]["later"]["runs"], written["parts"]["later"]["of"]) == (0, 6)
    out = io.StringIO()
    print_fits(study, Console(file=out, width=300))
    assert "curve (36 of 36 runs)" in out.getvalue() and "interior minimum at rho" in out.getvalue()
    assert "not resolved" in out.getvalue() and "later (0 of 6 runs)" in out.getvalue()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"part": "nowhere"}, "reference names part 'nowhere': the parts are"),
        ({"part": "changes", "size": 3}, "reference names axis 'size'.*axes variant"),
        ({"part": "changes", "variant": "huge"}, "reference variant=huge: part changes has no such point"),
    ],
)
def test_a_reference_must_exist(sweep: Sweep, rows: list[Row], reference: dict[str, Any], message: str) -> None:
    parts = {**only(sweep, "changes").parts, "place": sweep.parts["place"].replace(reference=reference)}
    with pytest.raises(SweepError, match=message):
        fits(sweep.replace(parts=parts), rows)


def test_a_reference_keeps_the_points_other_axes() -> None:
    losses = {("a", "short"): 5.0, ("b", "short"): 5.25, ("a", "long"): 4.0, ("b", "long"): 4.5}
    table = [table_row("p", 0, loss, v=v, budget=b) | {"run_id": v + b} for (v, b), loss in losses.items()]
    part = Part(
        base=Path("x"), axes={"v": {"a": {}, "b": {}}, "budget": {"short": {}, "long": {}}}, reference={"v": "a"}
    )
    view = bars_view("p", part, {"p": points(table, "p", part.axes)})
    assert [(bar.label, bar.reference, bar.difference and bar.difference.mean) for bar in view.bars] == [
        ("b, short", "a, short", 0.25),
        ("b, long", "a, long", 0.5),
    ]


def test_a_point_that_is_alone_is_compared_with_nothing() -> None:
    part = Part(base=Path("x"), view="lines")
    alone = {"p": points([table_row("p", 0, 4.0)], "p", part.axes)}
    assert lines_view("p", part, alone).findings == ["the only point: no other finished point to compare it with"]
    assert bars_view("p", part, alone).findings == ["the only point: nothing to compare it with"]


def test_the_complete_part_of_a_grid_keeps_most_runs() -> None:
    loss = np.arange(12.0).reshape(4, 3)
    loss[1:, 2] = np.nan
    loss[3, 0] = np.nan
    rows = tuple({"x": index} for index in range(4))
    complete = Points(("x",), rows, (7, 8, 9), loss).complete()
    assert complete.seeds == (7, 8) and complete.axis("x") == [0, 1, 2]
    assert complete.loss.tolist() == [[0, 1], [3, 4], [6, 7]]


def test_levels_of_seeds_do_not_widen_intervals() -> None:
    means, levels = np.array([1.0, 3.0, 2.0]), np.array([-0.5, 0.1, 0.4])
    loss = means[:, None] + levels
    found = spread(loss)
    assert np.allclose(found.losses, means[:, None]) and np.allclose(found.mean, means) and np.allclose(found.half, 0)
    # A missing run does not shift its point by its seed's level.
    loss[1, 2] = np.nan
    assert np.allclose(spread(loss).mean, means)
    # Student's t with 2 degrees of freedom, times the correction for three points.
    noisy = spread(np.array([[0.1, 0.0, -0.1], [-0.1, 0.0, 0.1], [0.0, 0.0, 0.0]]))
    assert noisy.half[0] == pytest.approx(2.919986 * 0.1 / math.sqrt(3) * math.sqrt(1.5), rel=1e-5)


def test_differences_in_words() -> None:
    lower = paired_difference([1.0, 2.0, 3.0], [1.5, 2.6, 3.4])
    # 0.5 +- 2.92 x 0.1 / sqrt(3)
    assert compared(lower, "it") == "0.500 nat below it (0.331 to 0.669)"
    assert interval(lower) == "−0.500 (−0.669 to −0.331)"
    assert compared(paired_difference([3.0, 4.0], [2.0, 2.9]), "it") == "1.050 nat above it (0.734 to 1.366)"
    assert compared(paired_difference([1.0, 2.0], [1.1, 1.9]), "it").endswith("(not resolved: −0.631 to +0.631)")
    assert compared(paired_difference([1.0], [2.0]), "it") == "1.000 nat below it (one seed: not resolved)"
    assert signed(-0.0001) == "+0.000"
