"""What is shown before anything is spent."""

from pathlib import Path

import pytest
from rich.console import Console

from engram.model.accounting import count_flops, count_parameters
from engram.sweep.grid import expand
from engram.sweep.plan import ASSUMED_SPEED, plan, plan_tables, speed, summary
from engram.sweep.pool import Pool
from tests.sweep.build import make_sweep
from tests.sweep.drive import finish


def test_points_carry_the_counts_of_their_models(tmp_path: Path) -> None:
    runs = expand(make_sweep(tmp_path, derive="allocation", axes={"rho": [1, 0.5]}, seeds=[0, 1, 2]))
    first, second = plan(runs)
    assert [len(point.runs) for point in (first, second)] == [3, 3]
    counts = count_parameters(second.runs[0].config.model)
    assert (second.total, second.activated, second.experts) == (counts.total, counts.activated, 10)
    assert second.rho == pytest.approx(0.5, abs=0.01) and first.rows == 0 and second.rows > 0
    assert second.tokens == 10 * 4 * 16
    assert second.flops == 640 * count_flops(second.runs[0].config.model, 16).training


def test_time_is_measured_where_it_can_be(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=[0, 1])
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    assert speed(runs, pool) == (ASSUMED_SPEED, "assumed, because no run has finished yet")
    finish(pool.run_folder(runs[0]), runs[0])
    per_token = count_flops(runs[0].config.model, 16).training
    assert speed(runs, pool) == (320 * per_token, "the median of 1 finished run")
    # One run of 640 tokens is left: two seconds.
    text = summary(runs, plan(runs), pool, jobs=1)
    assert "2 runs, 1 done, 1 to go" in text and "about 0:00:02 for the rest" in text


def test_shared_runs_are_counted_once(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, parts={"a": {}, "b": {}, "c": {"overrides": {"optim.lr": 0.5}}})
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    assert "2 runs (1 of 3 are shared by several parts)" in summary(runs, plan(runs), pool, jobs=1)


def test_every_part_has_a_table_of_its_own_axes(tmp_path: Path) -> None:
    parts = {"curve": {"derive": "allocation", "axes": {"rho": [0.5]}}, "rates": {"axes": {"optim.lr": [0.25, 0.125]}}}
    points = plan(expand(make_sweep(tmp_path, parts=parts)))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(*plan_tables(points, 1e9))
    text = capture.get()
    assert text.index("curve") < text.index("rho counted") < text.index("rates") < text.index("0.125")
    assert text.count("rho counted") == 1


def test_numbers_as_people_read_them(tmp_path: Path) -> None:
    """Gigabytes, days, one run: not 74.2 BB, 1000:00:00 and 1 runs."""
    axes = {"flops": [1e13], "rows": [0, 10_000_000]}
    sweep = make_sweep(tmp_path, derive="memory", axes=axes)
    runs, pool = expand(sweep), Pool(sweep.pool, sweep.out)
    points = plan(runs)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*plan_tables(points, 1e7))
    table = capture.get()
    # Four tables of 8 columns, with gradients and two moments.
    assert points[1].bytes > 4e9 and f"{points[1].bytes / 1e9:.1f} GB" in table and "BB" not in table
    assert "1e13" in table and "10000000000000" not in table and " d " in table
    assert summary(runs[:1], points[:1], pool, jobs=1).startswith("1 run, 0 done, 1 to go: ")


def test_a_thousand_runs_are_planned_with_few_counts(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path, derive="allocation", axes={"rho": [i / 16 for i in range(6, 16)]}, seeds=list(range(100))
    )
    runs = expand(sweep)
    assert len(runs) == len({run.id for run in runs}) == 1000
    assert len(plan(runs)) == 10
