"""The command line, from a sweep's file to its page, with real trainings."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engram.sweep import worker
from engram.sweep.__main__ import main
from tests.sweep.build import write_sweep
from tests.sweep.drive import FAKE, build, drive, load
from tests.sweep.planted import plant
from tests.training.conftest import config_tree

ROOT = Path(__file__).parents[2]


def sweep_file(folder: Path, **settings: Any) -> Path:
    """A sweep of tiny models on a tiny corpus."""
    generator = random.Random(3)
    words = ["".join(generator.choices("abdeiklmnorstuz", k=generator.randint(2, 7))) for _ in range(200)]
    with (folder / "documents.jsonl").open("w") as corpus:
        for _ in range(150):
            corpus.write(json.dumps({"text": " ".join(generator.choices(words, k=60))}) + "\n")
    base = config_tree(folder / "data", folder / "documents.jsonl", folder / "none")
    base["model"]["moe"] |= {"num_experts": 12}
    base["model"]["memory"] |= {"num_heads": 2, "head_dim": 4}
    base["model"]["vocab_size"] = 300
    base["train"] |= {"steps": 3, "eval_every": 1, "threads": None}
    return write_sweep(folder, base=base, **settings)


def test_from_file_to_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # Widths this small move by too much to be cut to measure.
    grid = dict(derive="allocation", compensate=False, axes={"rho": [1, 0.5]}, seeds=[0, 1])
    path = sweep_file(tmp_path, **grid)
    assert main(["plan", str(path), "--ids"]) == 0
    planned = capsys.readouterr().out
    assert "4 runs, 0 done, 4 to go" in planned and "assumed" in planned
    assert not (tmp_path / "pool").exists() and not (tmp_path / "out").exists()
    assert main(["run", str(path), "--jobs", "2"]) == 0
    assert "[4/4]" in capsys.readouterr().err
    assert main(["status", str(path), "--json"]) == 0
    states = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [state["status"] for state in states] == ["done"] * 4 and all(state["val_loss"] > 0 for state in states)
    assert main(["collect", str(path), "--require-all"]) == 0
    assert main(["fit", str(path)]) == 0
    assert main(["report", str(path)]) == 0
    out = tmp_path / "out"
    assert (out / "runs.csv").exists() and (out / "fits.json").exists() and (out / "report.html").exists()
    assert sorted(folder.name for folder in (out / "runs").iterdir()) == sorted({state["id"] for state in states})
    # Collected once, the study stands without its run folders, and nothing of it is trained again.
    (tmp_path / "pool").rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["run", str(path)]) == 0 and "nothing to do" in capsys.readouterr().err
    before = (out / "runs.csv").read_bytes()
    assert main(["collect", str(path), "--require-all"]) == 0 and (out / "runs.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["plan"], dict(axes={"rhoo": [1]}), "did you mean 'rho'?"),
        (["plan"], dict(derive="allocation", axes={"rho": [2]}), "rho is 2: feasible are ratios from"),
        (["plan"], dict(axes={"optim.lr": [float("inf")]}), "optim.lr=inf: config: optim.lr: is inf, but must be"),
        (["run", "--part", "x"], {}, "has no part 'x'"),
        (["collect", "--require-all"], {}, "1 missing run, but --require-all asks for all"),
    ],
)
def test_mistakes_end_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], settings: dict[str, Any], message: str
) -> None:
    path = write_sweep(tmp_path, **settings)
    assert main([arguments[0], str(path), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["run", "x.yaml", "--jobs", "0"], ["run", "x.yaml", "--jobs", "two"], ["walk"], []]
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_damaged_runs_end_collect_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_sweep(tmp_path, seeds=[0, 1])
    runs, pool = load(path)
    for run in runs:
        plant(pool.pool, run, 3.0)
    assert main(["collect", str(path)]) == 0
    (pool.run_folder(runs[0]) / "metrics.jsonl").write_text("")
    # The copy from before makes up for it.
    assert main(["collect", str(path)]) == 0
    (pool.copy_folder(runs[0]) / "done.json").unlink()
    capsys.readouterr()
    assert main(["collect", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 runs" in printed and f"damaged: sweep seed=0: {pool.run_folder(runs[0])} is damaged: " in printed
    assert main(["submit", str(path), "--dry-run"]) == 1 and "damaged: " in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(seeds=[0, 1, 2]), dict(seeds=[0, 2]), dict(overrides={"optim.lr": 0.5})])
def test_fit_and_report_notice_that_the_sweep_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict[str, Any]
) -> None:
    settings: dict[str, Any] = dict(view="lines", axes={"optim.clip_norm": [1, 0.5]}, seeds=[0, 1])
    path = write_sweep(tmp_path, **settings)
    assert main(["collect", str(path)]) == main(["fit", str(path)]) == 0
    # How results are read is no matter of the table.
    write_sweep(tmp_path, **{**settings, "view": "bars"})
    assert main(["fit", str(path)]) == 0
    write_sweep(tmp_path, **{**settings, **change})
    capsys.readouterr()
    for command in ("fit", "report"):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert "runs.parquet: holds 4 rows, which are not the " in error and "run `collect` again" in error
    assert main(["collect", str(path)]) == main(["fit", str(path)]) == 0


def test_fit_notices_other_names_of_the_same_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def write(name: str) -> str:
        return str(write_sweep(tmp_path, axes={"x": {"full": {}, name: {"optim.lr": 0.5}}}))

    assert main(["collect", write("fast")]) == 0
    assert main(["fit", write("faster")]) == 2
    assert "first sweep x=faster seed=0: " in capsys.readouterr().err


def test_runs_in_another_folder_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "runs" / "pool").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    path = write_sweep(tmp_path / "project", pool="runs/pool", out="results/study")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(path)]) == 0
    error = capsys.readouterr().err
    assert "from here, everything is trained again" in error and f"cd {tmp_path / 'project'} first" in error
    monkeypatch.chdir(tmp_path / "project")
    assert main(["plan", str(path)]) == 0 and capsys.readouterr().err == ""


def test_a_table_of_another_kind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_sweep(tmp_path)
    assert main(["collect", str(path)]) == 0
    (tmp_path / "out" / "curves.parquet").replace(tmp_path / "out" / "runs.parquet")
    capsys.readouterr()
    assert main(["fit", str(path)]) == 2
    assert "runs.parquet: has no column part: write it anew" in capsys.readouterr().err


def test_retry_leaves_diverged_runs_alone_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs, pool = build(tmp_path, "diverge", "sleep 0")
    drive(runs, pool)
    assert main(["retry", str(path)]) == 1
    error = capsys.readouterr().err
    assert "1 diverged run left alone: trained again, each would diverge at the same step" in error
    assert pool.state(runs[0]).status == "failed"
    monkeypatch.setattr(worker, "TRAIN", FAKE[1])
    assert main(["retry", str(path), "--diverged"]) == 1
    assert pool.state(runs[0]).attempt == 2


def test_retry_with_nothing_to_retry(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["retry", str(write_sweep(tmp_path)), "--failed"]) == 0
    assert "nothing to retry" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["submit"]])
def test_help_is_quick_and_helps(command: list[str]) -> None:
    script = "import sys; from engram.sweep.__main__ import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage: python -m engram.sweep" in done.stdout
    assert command != ["run"] or "no longer the same to the bit" in " ".join(done.stdout.split())
    assert not {"torch", "numpy", "scipy", "matplotlib", "pyarrow"} & set(done.stdout.split())


def test_shipped_sweeps_can_be_planned(capsys: pytest.CaptureFixture) -> None:
    for path in sorted((ROOT / "configs/sweep").glob("*.yaml")):
        assert main(["plan", str(path)]) == 0, path
        header = path.read_text().split("\n\n")[0].lower()
        assert f"configs/sweep/{path.name}" in header and "cost:" in header
        assert yaml.safe_load(path.read_text())
        assert f"`{path.name}`" in (ROOT / "configs/sweep/README.md").read_text()
