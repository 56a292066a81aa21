"""What ranks, divided tables and tables beyond the device cost, against one process that holds everything.

    python -m benchmarks.distributed [--repeats 5] [--steps 40] [--ranks 1 2 4]

Trainings are those of configs/quickstart.yaml cut to `--steps`, eager, one CPU thread each process, as a user starts
them: every contender trains once in each turn, and its speed is that of its metrics.jsonl, without the first steps.
Ratios within a turn are what to read. On a machine with fewer cores than ranks, ranks wait for each other's turn.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from engram.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/quickstart.yaml"
# Steps before the speed is read.
WARMUP = 10


@dataclass(frozen=True)
class Contender:
    """A way to train; `against` names the one that its speed is compared with."""

    name: str
    ranks: int
    overrides: tuple[str, ...] = ()
    against: str | None = None


def contenders(ranks: list[int]) -> Iterator[Contender]:
    yield Contender("one process", 1)
    for tier in ("host", "file"):
        stored = f"train.tables={{tier: {tier}, cache_rows: 32768}}"
        yield Contender(f"one process, tables in {tier}", 1, (stored,), against="one process")
    for count in ranks:
        ranks_of = f"{count} rank{'s' * (count > 1)}"
        whole = f"{ranks_of}, tables on each"
        yield Contender(whole, count, ("distributed={}",), against="one process")
        if count > 1:
            yield Contender(f"{ranks_of}, tables divided", count, ("distributed={table_ranks: all}",), against=whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=FEWEST_REPEATS, metavar="N")
    parser.add_argument("--steps", type=at_least(2 * WARMUP), default=40, metavar="N", help="steps of each training")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2, 4], metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = training_rows(Path(folder), list(contenders(options.ranks)), options.repeats, options.steps)
    show(rows)
    if options.repeats < FEWEST_REPEATS:
        print(f"fewer than {FEWEST_REPEATS} repeats are a trial: nothing is saved")
    else:
        print(f"saved to {save_results(rows, describe_machine('cpu'), 'distributed').relative_to(ROOT)}")


# ------------------------------------------------------------------------------------------------------------ trainings


def training_rows(folder: Path, all_of_them: list[Contender], repeats: int, steps: int) -> list[dict[str, Any]]:
    speeds: dict[str, list[float]] = {each.name: [] for each in all_of_them}
    traffic: dict[str, dict[str, float]] = {}
    for _ in track(range(repeats), description="trainings"):
        for contender in all_of_them:
            lines = train(folder / "run", contender, steps)
            speeds[contender.name].append(statistics.median(line["tokens_per_second"] for line in lines))
            traffic[contender.name] = {key: lines[-1][key] for key in lines[-1] if key.startswith("tables/")}
    return [
        {
            "name": each.name,
            "ranks": each.ranks,
            "tokens_per_second": statistics.median(speeds[each.name]),
            "repeats": repeats,
            **(
                {"against": each.against, "step_time_ratios": ratios(speeds[each.against], speeds[each.name])}
                if each.against
                else {}
            ),
            **traffic[each.name],
        }
        for each in all_of_them
    ]


def train(run_dir: Path, contender: Contender, steps: int) -> list[dict[str, Any]]:
    """Train anew -> the lines of metrics.jsonl after the first steps."""
    shutil.rmtree(run_dir, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(contender.ranks)]
    quiet = [
        *(f"train.{key}={steps}" for key in ("steps", "checkpoint_every", "eval_every")),
        f"train.log_every={WARMUP}",
        "train.compile=false",
        "train.statistics_every=null",
        "train.threads=1",
        "train.wandb.mode=disabled",
        "eval.tokens=4096",
        f"run_dir={run_dir}",
    ]
    command = [sys.executable, *(launcher if contender.ranks > 1 else []), "train.py", str(CONFIG)]
    done = subprocess.run(
        [*command, *quiet, *contender.overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{contender.name}: training ended with status {done.returncode}\n{done.stderr}")
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] > WARMUP]


def ratios(base: list[float], own: list[float]) -> list[float]:
    """Step times as multiples of the other's, turn by turn."""
    return [theirs / ours for theirs, ours in zip(base, own, strict=True)]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    for head in ("tokens/s", "step time", "rows"):
        table.add_column(head)
    for row in rows:
        against = f"{statistics.median(row['step_time_ratios']):.2f} x {row['against']}" if "against" in row else ""
        notes = ", ".join(f"{key.removeprefix('tables/')} {row[key]:.4g}" for key in row if key.startswith("tables/"))
        table.add_row(row["name"], f"{row['tokens_per_second']:,.0f}", against, notes)
    Console().print(table)


if __name__ == "__main__":
    main()
