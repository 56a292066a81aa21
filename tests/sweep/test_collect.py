"""Run folders -> the tidy table."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from engram.config import load_config
from engram.model.accounting import count_flops, count_parameters, rho, table_rows
from engram.sweep.collect import collect
from engram.sweep.grid import Run, expand, unique
from engram.sweep.spec import Sweep, SweepError
from engram.sweep.tables import read_table
from tests.sweep.build import make_sweep
from tests.sweep.planted import plant, plant_all

PARTS = {
    "curve": {"derive": "allocation", "axes": {"steps": {"short": {"train.steps": 8}}, "rho": [1, 0.8, 0.5]}},
    "bars": {
        "derive": "allocation",
        "axes": {"variant": {"full": {"rho": 0.5}, "no conv": {"rho": 0.5, "model.memory.conv": None}}},
    },
}


def make_study(folder: Path) -> tuple[Sweep, list[Run]]:
    sweep = make_sweep(folder, seeds=[0, 1], overrides={"train.steps": 8}, parts=PARTS)
    return sweep, expand(sweep)


def loss_of(run: Run) -> float:
    return 4 + int(run.id[:4], 16) / 2**16


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def study(tmp_path: Path) -> tuple[Sweep, list[Run]]:
    sweep, runs = make_study(tmp_path)
    plant_all(sweep.pool, runs, loss_of)
    return sweep, runs


def test_one_row_for_each_run_of_each_part(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collected = collect(sweep, runs)
    rows = read_table(sweep.out / "runs.parquet")
    assert [(row["part"], row["run_id"], row["seed"]) for row in rows] == [(run.part, run.id, run.seed) for run in runs]
    # rho = 0.5 of both parts is the same model at the same length: one run, two rows.
    assert (collected.done, len(rows)) == (8, 10) and not collected.missing and not collected.failed
    # `steps` is a fixed column, so that the axis of that name has a prefix; axes of other parts are empty.
    assert [(row["axis.steps"], row["rho"], row["variant"]) for row in rows[::2]] == [
        ("short", 1.0, None),
        ("short", 0.8, None),
        ("short", 0.5, None),
        (None, None, "full"),
        (None, None, "no conv"),
    ]
    assert list(rows[0])[:7] == ["part", "run_id", "seed", "status", "axis.steps", "rho", "variant"]


def test_counts_are_those_of_the_config(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collect(sweep, runs)
    for run, row in zip(runs, read_table(sweep.out / "runs.parquet"), strict=True):
        model = run.config.model
        counts, memory, moe = count_parameters(model), model.memory, model.moe
        assert moe is not None
        expected: dict[str, Any] = {
            "total": counts.total,
            "activated": counts.activated,
            "memory": counts.memory,
            "sparse": counts.total - counts.activated,
            "vocabulary": counts.vocabulary,
            "rho_counted": rho(model),
            "experts": moe.num_experts,
            "rows": table_rows(model),
            "rows_per_head": memory.rows_per_head[0] if memory else 0,
            "d_mem": memory.d_mem if memory else 0,
            "shared_dim": moe.shared_width,
            "ffn_dim": model.dense_width,
            "steps": 8,
            "tokens": 8 * 4 * 16,
            "tokens_per_parameter": 512 / (counts.total + counts.vocabulary),
            "flops_per_token": count_flops(model, 16).training,
            "training_flops": 512 * count_flops(model, 16).training,
            "commit": "0123456789abcdef",
            "machine": "a processor",
            "torch": "2.13.0",
        }
        assert {name: row[name] for name in expected} == expected
    assert rows_differ(sweep, "rows") and rows_differ(sweep, "experts")


def rows_differ(sweep: Sweep, column: str) -> bool:
    return len({row[column] for row in read_table(sweep.out / "runs.parquet")}) > 1


def test_losses_and_speed_are_those_of_the_metrics(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collect(sweep, runs)
    row, loss = read_table(sweep.out / "runs.parquet")[0], loss_of(runs[0])
    assert row["status"] == "done"
    assert row["val_loss"] == row["val_loss_best"] == loss
    assert row["train_loss"] == loss + 2 / 8
    assert row["seconds"] == pytest.approx(512 / 1000) and row["tokens_per_second"] == pytest.approx(1000)
    curves = [line for line in read_table(sweep.out / "curves.parquet") if line["run_id"] == runs[0].id]
    assert [line["step"] for line in curves] == list(range(1, 9))
    assert [line["tokens"] for line in curves] == [64 * step for step in range(1, 9)]
    assert curves[3]["loss"] == loss + 0.5 and curves[3]["grad_norm"] == 0.5 and curves[3]["lr"] == 0.01
    assert [line["step"] for line in curves if line["val_loss"] is not None] == [2, 4, 6, 8]


def test_csv_holds_every_digit(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collect(sweep, runs)
    with open(sweep.out / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = read_table(sweep.out / "runs.parquet")
    assert list(lines[0]) == list(rows[0])
    for line, row in zip(lines, rows, strict=True):
        assert {name: float(line[name]) for name in ("val_loss", "rho_counted", "training_flops")} == {
            name: row[name] for name in ("val_loss", "rho_counted", "training_flops")
        }
        assert line["variant"] == (row["variant"] or "") and line["rho"] == (
            "" if row["rho"] is None else f"{row['rho']:g}"
        )


def test_the_copy_alone_gives_the_same_bytes(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    (sweep.pool / runs[0].id / "step_000008").mkdir()
    (sweep.pool / runs[0].id / "step_000008" / "model.safetensors").write_text("large")
    collect(sweep, runs)
    first = bytes_below(sweep.out)
    assert {path.split("/")[2] for path in first if path.startswith("runs/")} == {
        "config.yaml",
        "metrics.jsonl",
        "done.json",
        "code.json",
    }
    collect(sweep, runs)
    assert bytes_below(sweep.out) == first
    shutil.rmtree(sweep.pool)
    assert collect(sweep, runs).done == 8
    assert bytes_below(sweep.out) == first


def test_missing_runs_are_rows_that_count_but_measured_nothing(tmp_path: Path) -> None:
    sweep, runs = make_study(tmp_path)
    plant_all(sweep.pool, runs[1:], loss_of)
    # In training: metrics, but no end.
    unfinished = sweep.pool / runs[2].id
    (unfinished / "done.json").unlink()
    collected = collect(sweep, runs)
    assert [run.id for run in collected.missing] == [runs[0].id, runs[2].id] and collected.done == 6
    assert "6 of 8 runs" in collected.says and "curve steps=short rho=1 seed=0" in collected.says
    row = read_table(sweep.out / "runs.parquet")[0]
    assert row["status"] == "missing" and row["total"] == count_parameters(runs[0].config.model).total
    assert row["val_loss"] is None and row["seconds"] is None and row["commit"] is None
    assert not (sweep.out / "runs" / runs[2].id).exists()


@pytest.mark.parametrize("place", ["pool", "copy"])
def test_damaged_runs_are_left_out_and_all_of_them_named(study: tuple[Sweep, list[Run]], place: str) -> None:
    sweep, runs = study
    once = unique(runs)
    folder = sweep.pool
    if place == "copy":
        collect(sweep, runs)
        shutil.rmtree(sweep.pool)
        folder = sweep.out / "runs"
    cut, emptied, torn, other, lost, coded = [folder / run.id for run in once[:6]]
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text()[:-20])
    (emptied / "metrics.jsonl").write_text("")
    (torn / "metrics.jsonl").write_text((torn / "metrics.jsonl").read_text().replace('{"step": 3,', '{"step" 3,'))
    shutil.copy(folder / once[7].id / "config.yaml", other / "config.yaml")
    (lost / "done.json").write_text("{}")
    (coded / "code.json").write_text("no JSON")
    collected = collect(sweep, runs)
    assert (collected.done, collected.missing, collected.failed) == (2, (), ())
    said = collected.says.splitlines()
    assert said[0].endswith("2 of 8 runs") and len(said) == 7
    reasons = [
        "ends at step 7, but it was trained to step 8",
        "ends at step 0, but it was trained to step 8",
        "line 3 is not JSON",
        f"that of run {once[7].id}, but the folder is named as run {other.name}",
        "its done.json names no step",
        "code.json: is damaged",
    ]
    for run, line, reason in zip(once, said[1:], reasons, strict=False):
        assert line.startswith(f"damaged: {run.part} {run.label}: ") and reason in line
    rows = read_table(sweep.out / "runs.parquet")
    assert [row["val_loss"] is None for row in rows] == [run.id not in {once[6].id, once[7].id} for run in runs]
    if place == "pool":
        assert {path.name for path in (sweep.out / "runs").iterdir()} == {once[6].id, once[7].id}


def test_a_whole_copy_makes_up_for_a_damaged_run(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collect(sweep, runs)
    first = bytes_below(sweep.out)
    (sweep.pool / runs[0].id / "metrics.jsonl").write_text("")
    collected = collect(sweep, runs)
    assert collected.done == 8 and not collected.damaged and bytes_below(sweep.out) == first


def test_runs_that_saw_different_data_are_named(study: tuple[Sweep, list[Run]]) -> None:
    """A file of texts may have changed under the name that stands in the config."""
    sweep, runs = study

    def note(run: Run, data: str) -> None:
        path = sweep.pool / run.id / "code.json"
        [start] = json.loads(path.read_text())["starts"]
        path.write_text(json.dumps({"starts": [{**start, "data_digest": data * 64, "tokenizer_digest": "f" * 64}]}))

    # Runs of before the digests were noted are not compared.
    for run in runs[:3]:
        note(run, "a")
    assert collect(sweep, runs).mixed == ()
    note(runs[1], "b")
    [words] = collect(sweep, runs).mixed
    assert words == (
        f"curve: its runs saw different data, and are not to be compared: 2 runs ({runs[0].label}) {'a' * 12} "
        f"{'f' * 12}; 1 run ({runs[1].label}) {'b' * 12} {'f' * 12}"
    )
    assert f"warning: {words}" in collect(sweep, runs).says.splitlines()


def test_settings_that_do_not_matter_may_differ(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    path = sweep.pool / runs[0].id / "config.yaml"
    path.write_text(path.read_text().replace("threads: null", "threads: 2"))
    assert load_config(path).train.threads == 2
    assert collect(sweep, runs).done == 8


def test_a_diverged_run_is_a_row_without_losses(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    finished, stopped = sweep.pool / runs[0].id, sweep.pool / runs[1].id
    done = json.loads((finished / "done.json").read_text())
    (finished / "done.json").write_text(json.dumps({**done, "val_loss": None}))
    (stopped / "done.json").unlink()
    (stopped / "postmortem_000005").mkdir()
    collected = collect(sweep, runs)
    assert [run.id for run in collected.failed] == [runs[0].id, runs[1].id] and not collected.missing
    rows = read_table(sweep.out / "runs.parquet")[:2]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all(row[name] is None for row in rows for name in ("val_loss", "train_loss", "val_loss_best"))
    first = bytes_below(sweep.out)
    shutil.rmtree(sweep.pool)
    collect(sweep, runs)
    assert bytes_below(sweep.out) == first


def test_a_run_that_was_trained_again_replaces_its_copy(study: tuple[Sweep, list[Run]]) -> None:
    sweep, runs = study
    collect(sweep, runs)
    shutil.rmtree(sweep.pool / runs[0].id)
    plant(sweep.pool, runs[0], 1.5)
    collect(sweep, runs)
    shutil.rmtree(sweep.pool)
    collect(sweep, runs)
    assert read_table(sweep.out / "runs.parquet")[0]["val_loss"] == 1.5


def test_nothing_collected_yet(tmp_path: Path) -> None:
    sweep, runs = make_study(tmp_path)
    with pytest.raises(SweepError, match="collect"):
        read_table(sweep.out / "runs.parquet")
    collected = collect(sweep, runs)
    assert collected.done == 0 and len(collected.missing) == 8
    assert read_table(sweep.out / "curves.parquet") == []
    assert all(math.isfinite(row["rho_counted"]) for row in read_table(sweep.out / "runs.parquet"))


def test_an_axis_of_mixed_values_is_text(tmp_path: Path) -> None:
    axes = {"model.memory.gate": ["plain", None], "optim.betas": [[0.9, 0.95], [0.8, 0.9]], "optim.lr": [1, 0.5]}
    sweep = make_sweep(tmp_path, axes=axes)
    collect(sweep, expand(sweep))
    rows = read_table(sweep.out / "runs.parquet")
    assert [row["model.memory.gate"] for row in rows[::4]] == ["plain", "null"]
    assert [row["optim.betas"] for row in rows[:4:2]] == ["[0.9, 0.95]", "[0.8, 0.9]"]
    assert [row["optim.lr"] for row in rows[:2]] == [1.0, 0.5]
