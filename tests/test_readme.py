"""The README keeps its word: numbers stand in committed files, paths exist, commands run."""

import csv
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from engram.config import load_config
from engram.model.accounting import count_parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# What makes a config small enough to run here without changing what a command does.
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.moe.num_experts=4",
    "model.moe.expert_dim=16",
    "model.memory.rows_per_head=64",
    "data.sequence_length=32",
    "train.steps=2",
    "train.batch_size=2",
    "train.compile=false",
    "train.threads=1",
    "train.wandb.mode=disabled",
    "eval.tokens=512",
    "eval.sample_tokens=4",
)


def _rows(heading: str) -> list[list[str]]:
    """Cells of the first table after `heading`, its head and rule left out."""
    after = README.split(heading, 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert lines, f"no table after {heading!r}"
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.group().splitlines()[2:]]


def _commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_config_table_states_counts_and_committed_losses() -> None:
    rows = _rows("## Configs")
    assert len(rows) >= 5
    for name, total, activated, memory, tokens, minutes, loss in rows:
        config = load_config(ROOT / "configs" / f"{name.strip('`')}.yaml")
        counts = count_parameters(config.model)
        expected = [f"{count / 1e6:.2f} M" for count in (counts.total, counts.activated, counts.memory)]
        assert [total, activated, memory] == expected, name
        assert tokens == f"{config.tokens_per_step * config.train.steps / 1e6:.2f} M", name
        run = ROOT / "results" / name.strip("`")
        done = json.loads((run / "done.json").read_text())
        assert loss == f"{done['val_loss']:.3f}", name
        assert done["step"] == config.train.steps and minutes
        assert load_config(run / "config.yaml").model == config.model, f"{name} has changed since its run"


def test_quickstart_table_equals_the_committed_run() -> None:
    losses = json.loads((ROOT / "results/quickstart/losses.json").read_text())
    table = {row[0]: row[1] for row in _rows("## Two commands")}
    assert table == {name: f"{value:.3f}" for name, value in losses.items()}
    done = json.loads((ROOT / "results/quickstart/done.json").read_text())
    assert losses["this model"] == pytest.approx(done["val_loss"], abs=2e-3)
    assert losses["this model"] < losses["bigram"] - 0.15


def test_study_table_equals_the_committed_runs() -> None:
    with (ROOT / "results/study/runs.csv").open() as file:
        runs = [row for row in csv.DictReader(file) if row["part"] == "allocation"]
    table = _rows("## Sweep: how much to experts, how much to memory?")
    assert len(table) == len({run["rho"] for run in runs}) >= 8
    for rho, experts, rows, *cells in table:
        for budget, loss, difference in (("short", *cells[:2]), ("long", *cells[2:])):
            own = [run for run in runs if run["budget"] == budget]
            only = {run["seed"]: float(run["val_loss"]) for run in own if float(run["rho"]) == 1}
            seeds = [run for run in own if float(run["rho"]) == float(rho)]
            assert len(seeds) == 3
            assert {run["experts"] for run in seeds} == {experts}
            assert {f"{int(run['rows']):,}" for run in seeds} == {rows}
            assert loss == f"{statistics.mean(float(run['val_loss']) for run in seeds):.3f}"
            paired = statistics.mean(float(run["val_loss"]) - only[run["seed"]] for run in seeds)
            assert difference == f"{paired:+.3f}"


def test_study_verdicts_equal_the_committed_fits() -> None:
    text = " ".join(README.split("## Sweep", 1)[1].split("\n## ", 1)[0].split())
    part = json.loads((ROOT / "results/study/fits.json").read_text())["parts"]["allocation"]
    short, long = (curve["fit"] for curve in part["curves"])
    assert short["verdict"] == "no interior minimum" and "there is no interior minimum" in text
    gain, cost = short["against_moe"], short["regret_paper"]
    assert f"{-gain['mean']:.3f} nat below experts only ({-gain['high']:.3f} to {-gain['low']:.3f}, 90 %)" in text
    low, high = cost["interval"]
    assert f"costs {cost['loss']:.3f} nat more than that ({low:.3f} to {high:.3f})" in text
    assert long["verdict"] == "interior minimum" and "the curve is a U" in text
    low, high = long["argmin_interval"]
    assert f"minimum lies at {long['argmin']:.2f}, and the interval ({low:.2f} to {high:.2f}, 90 %)" in text
    (move,) = part["moves"]
    low, high = move["interval"]
    assert move["verdict"] == "moves" and f"by {move['difference']:.2f} ({low:.2f} to {high:.2f})" in text


def test_ablations_equal_the_committed_fit() -> None:
    parts = json.loads((ROOT / "results/study/fits.json").read_text())["parts"]
    text = README.split("The other parts. ", 1)[1]
    found = re.findall(r"^\| ([\w -]+) \| ([+-]\d\.\d+) \| (yes|no) \|$", text, re.MULTILINE)
    bars = {bar["label"]: bar["difference"] for bar in parts["ablations"]["bars"]}
    assert {name: (difference, resolved == "yes") for name, difference, resolved in found} == {
        name: (f"{difference['mean']:+.3f}", difference["resolved"]) for name, difference in bars.items()
    }
    line = parts["memory"]["curves"][0]["fit"]
    low, high = line["per_decade_interval"]
    assert f"by {line['per_decade']:.3f} nat ({low:.3f} to {high:.3f})" in " ".join(text.split())


def test_first_look_equals_the_committed_studies() -> None:
    inside = ROOT / "results/analysis/inside"
    with (inside / "logit_lens/scalars.csv").open() as file:
        found = {
            row["model"]: row for row in csv.DictReader(file) if (row["run"], row["scalar"]) == ("all", "crossing_half")
        }
    with (inside / "sensitivity/loss.csv").open() as file:
        (off,) = [
            row
            for row in csv.DictReader(file)
            if (row["condition"], row["run"], row["bin"]) == ("zero_embedding", "all", "all")
        ]
    mean, low, high = (
        f"{float(found['experts and memory - experts only'][key]):.1f}" for key in ("mean", "low", "high")
    )
    with_memory, without = (f"{float(found[name]['mean']):.1f}" for name in ("experts and memory", "experts only"))
    rise = [f"{float(off[key]):.3f}" for key in ("rise", "rise_low", "rise_high")]
    paragraph = " ".join(README.split("**A first look**", 1)[1].split("\n\n", 1)[0].split())
    for said in (
        f"{with_memory} blocks with memory and at {without} without",
        f"({mean}, {low} to {high}, 90 %)",
        f"{rise[0]} nat ({rise[1]} to {rise[2]})",
    ):
        assert said in paragraph


KEY = ("recipe", "baseline", "metric", "group")
OF_ALL = ("", "accuracy", "all")


def test_facts_equal_the_committed_scores() -> None:
    means: list[dict[str, str]] = []
    for folder in ("results/facts", "results/facts/longer"):
        with (ROOT / folder / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        means += [
            {row["task"]: row["mean"] for row in rows if tuple(row[column] for column in KEY) == (recipe, *OF_ALL)}
            for recipe in ("no memory", "rho 0.50")
        ]
    for name, *values in _rows("At equal parameters"):
        assert values == [f"{float(mean[name.strip('`')]):.3f}" for mean in means], name


def test_speed_table_equals_the_committed_measurement() -> None:
    (path,) = [ROOT / name for name in re.findall(r"\((benchmarks/results/training_\S+\.jsonl)\)", README)]
    measured = {row["contender"]: row for row in map(json.loads, path.read_text().splitlines())}
    for contender, step, ratio in _rows("## Speed"):
        assert step == f"{measured[contender]['median_ms']:.0f} ms", contender
        assert ratio == f"{measured[contender]['speed_against_best_peer']:.2f}", contender


def test_speed_of_sweeps_equals_the_committed_measurement() -> None:
    (path,) = [ROOT / name for name in re.findall(r"\((benchmarks/results/sweep_\S+\.jsonl)\)", README)]
    measured = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    said = [
        f"{measured['driver, one at a time']['overhead_per_run']:.1%} more time",
        f"{measured['driver, two at a time']['speedup']:.2f} times as fast",
        f"1,000 runs takes {measured['plan, 1000 runs']['median_s']:.2f} s",
        f"1,000 runs {measured['status, 1000 runs']['median_s']:.2f} s",
    ]
    paragraph = " ".join(README.split("`make bench PART=sweep`", 1)[1].split("\n\n", 1)[0].split())
    assert [each for each in said if each not in paragraph] == []


def test_scaling_table_equals_the_committed_measurement() -> None:
    (path,) = [ROOT / name for name in re.findall(r"\((benchmarks/results/distributed_\S+\.jsonl)\)", README)]
    measured = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        [
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{statistics.median(row['step_time_ratios']):.2f}" if "against" in row else "",
            row.get("against", ""),
        ]
        for row in measured
    ]
    assert _rows("What it costs here") == expected
    (two,) = [row for row in measured if row["name"] == "2 ranks, tables divided"]
    assert f"{two['tables/bytes_sent'] / 1e6:.2f} MB" in README and two["tables/bytes_over_needed"] - 1 < 0.002 / 100


def test_stalls_of_checkpoints_equal_the_committed_measurement() -> None:
    (path,) = [ROOT / name for name in re.findall(r"\((benchmarks/results/checkpoints_\S+\.jsonl)\)", README)]
    waiting, beside = (json.loads(line)["stall_s_per_10_GB"] for line in path.read_text().splitlines())
    said = f"stops training for {waiting:.2f} s, or beside training for {beside:.2f} s"
    assert said in " ".join(README.split())


def test_costs_of_looking_inside_equal_the_committed_measurements() -> None:
    studies, scoring = (
        [json.loads(line) for line in (ROOT / name).read_text().splitlines()]
        for part in ("analysis", "scoring")
        for name in re.findall(rf"\((benchmarks/results/{part}_\S+\.jsonl)\)", README)
    )
    assert {row["tokens"] for row in studies} == {100_000}
    lens, cka = (max(row["median_s"] for row in studies if row["name"].startswith(kind)) for kind in ("Logit", "CKA"))
    gigabytes = max(row["peak_bytes"] for row in studies) / 1e9
    best = [
        min(row["ours_is_faster"] for row in scoring if row["workload"] == workload and row["contender"] != "ours")
        for workload in dict.fromkeys(row["workload"] for row in scoring)
    ]
    first, second, third = (f"{ratio:.1f}" for ratio in best)
    text = " ".join(README.split())
    assert f"`logit_lens` {lens:.1f} s and `cka` {cka:.1f} s with at most {gigabytes:.2f} GB" in text
    assert f"scored {first}, {second} and {third} times as fast" in text


def test_kernel_table_states_every_target_as_measured() -> None:
    (path,) = [ROOT / name for name in re.findall(r"\((benchmarks/results/kernels_\S+\.jsonl)\)", README)]
    verdicts = [row for row in map(json.loads, path.read_text().splitlines()) if "target" in row]
    expected = [[row["contest"].partition(":")[0], row["target"], row["shown"], row["met"]] for row in verdicts]
    assert len(expected) >= 10
    assert _rows("## Kernels") == expected


def test_every_path_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    tree = README.split("## Where things are", 1)[1].split("```")[1]
    folders = [""]
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        if "<" in name:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth + 1 :] = [folders[depth] + name if name.endswith("/") else folders[depth]]
        assert (ROOT / folders[depth] / name).exists(), folders[depth] + name


@pytest.mark.timeout(480)
def test_commands_run(tmp_path: Path) -> None:
    """In their order, in an empty folder, with this interpreter; only sizes differ."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    shutil.copytree(ROOT / "results/study", tmp_path / "results/study")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # It replaces the compiler that one of the commands runs.
    environment.pop("TRITON_INTERPRET", None)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # What `make quickstart` does first.
    commands = [
        ".venv/bin/python -m engram.data prepare configs/quickstart.yaml",
        ".venv/bin/python train.py configs/quickstart.yaml run_dir=runs/quickstart",
        *_commands(),
    ]
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        folder, _, program = words.pop(0).rpartition("/")
        assert (folder, program in ("python", "torchrun", "deepspeed")) == (".venv/bin", True), command
        if "train.py" in words and "--dry-run" not in words:
            # Overrides on the line come last and win; without a memory its rows cannot be set.
            small = [each for each in SMALL if not ("model.memory=null" in words and each.startswith("model.memory."))]
            config = words.index("train.py") + 1
            words[config + 1 : config + 1] = small
            words = [word for word in words if word != "train.steps=50"]
        words = ["1500" if word == "20000" else word for word in words]
        if words[:3] == ["-m", "engram.sweep", "run"]:
            # Hours of training; what it would do is planned.
            words[2] = "plan"
        runs = [sys.executable] if program == "python" else [str(Path(sys.executable).with_name(program))]
        done = subprocess.run([*runs, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "gates.html").exists()
