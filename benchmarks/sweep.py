"""What the sweep driver costs, and what running two trainings side by side gains.

    python -m benchmarks.sweep [--repeats 5] [--steps 30]

Trainings are those of configs/quickstart.yaml cut to `--steps`, eager, each in a process of its own. In turns: the
driver with one training at a time, the driver with two at a time (half of the cores each), and a plain loop over
`train.py` without a driver. Medians and ratios are what to read.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from engram.config import load_config, save_config
from engram.sweep.grid import expand
from engram.sweep.spec import load_sweep

ROOT = Path(__file__).parents[1]
# Runs of one measurement: one for each of the two at a time.
RUNS = 2
PLANNED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=FEWEST_REPEATS, metavar="N")
    parser.add_argument("--steps", type=at_least(1), default=30, metavar="N", help="steps of each training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.repeats, options.steps)
    show(rows)
    if options.repeats < FEWEST_REPEATS:
        print(f"fewer than {FEWEST_REPEATS} repeats are a trial: nothing is saved")
    else:
        print(f"saved to {save_results(rows, describe_machine('cpu'), 'sweep').relative_to(ROOT)}")


def measure(folder: Path, repeats: int, steps: int) -> list[dict[str, Any]]:
    sweep = write_sweep(folder, steps, runs=RUNS)
    contenders: dict[str, Callable[[], None]] = {
        "driver, one at a time": lambda: drive(sweep, jobs=1),
        "driver, two at a time": lambda: drive(sweep, jobs=2),
        "train.py in a loop": lambda: loop(sweep),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # The first round fills caches and is not counted.
    for turn in track(range(repeats + 1), description="trainings"):
        for name, work in contenders.items():
            shutil.rmtree(folder / "pool", ignore_errors=True)
            taken = timed(work)
            if turn:
                seconds[name].append(taken)
    rows = [{"name": name, "runs": RUNS, **summary(times)} for name, times in seconds.items()]
    one, two, plain = (row["median_s"] for row in rows)
    rows[1]["speedup"] = one / two
    rows[0]["overhead_per_run"] = (one - plain) / plain
    grid = write_sweep(folder, steps, runs=PLANNED)
    for command in ("plan", "status"):
        times = [timed(call, command, grid) for _ in range(repeats)]
        rows.append({"name": f"{command}, {PLANNED} runs", "runs": PLANNED, **summary(times)})
    return rows


def write_sweep(folder: Path, steps: int, runs: int) -> Path:
    """A sweep over seeds, and over as many ratios as make `runs` of it."""
    config = load_config(ROOT / "configs/quickstart.yaml")
    train = config.train.replace(steps=steps, compile=False, checkpoint_every=steps, eval_every=steps)
    quiet = train.replace(statistics_every=None, wandb=train.wandb.replace(mode="disabled"))
    save_config(config.replace(train=quiet, eval=config.eval.replace(tokens=4096)), folder / "base.yaml")
    tree: dict[str, Any] = {"base": "base.yaml", "pool": str(folder / "pool"), "out": str(folder / "out")}
    if runs <= RUNS:
        tree["seeds"] = list(range(runs))
    else:
        ratios = [experts / 14 for experts in range(4, 14)]
        tree |= {"derive": "allocation", "axes": {"rho": ratios}, "seeds": list(range(runs // len(ratios)))}
    path = folder / f"sweep_{runs}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def drive(sweep: Path, jobs: int) -> None:
    call("run", sweep, "--jobs", str(jobs))


def loop(sweep: Path) -> None:
    for run in expand(load_sweep(sweep)):
        path = sweep.parent / f"{run.id}.yaml"
        save_config(run.config, path)
        threads = f"train.threads={os.cpu_count()}"
        subprocess.run([sys.executable, str(ROOT / "train.py"), str(path), threads], check=True, capture_output=True)


def call(command: str, sweep: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "engram.sweep", command, str(sweep), *arguments],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )


def timed(work: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "repeats": len(times),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "median", "fastest to slowest", "", box=None, header_style="bold")
    for row in rows:
        note = f"{row['speedup']:.2f} x one at a time" if "speedup" in row else ""
        note = f"{row['overhead_per_run']:+.1%} over the loop" if "overhead_per_run" in row else note
        table.add_row(
            row["name"], f"{row['median_s']:.2f} s", f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f} s", note
        )
    Console().print(table)


if __name__ == "__main__":
    main()
