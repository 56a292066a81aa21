"""What LogitLens and CKA of two tiny models take: seconds and memory of the whole command.

    python -m benchmarks.analysis [--repeats 5] [--tokens 100000]

The models are those of configs/tiny_engram.yaml and configs/tiny_moe.yaml after one step of training: a measurement
reads the same numbers of layers, streams and tokens whatever the weights are. A tenth of the texts is for validation,
so that there are tokens enough.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results

ROOT = Path(__file__).parents[1]
MODEL, BASELINE = "tiny_engram", "tiny_moe"
# At most, of each command.
TARGET_SECONDS, TARGET_BYTES = 120, 2 * 10**9
TRAINED = ("train.stop_after=1", "train.compile=false", "train.wandb.mode=disabled", "data.validation_fraction=0.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=FEWEST_REPEATS, metavar="N")
    parser.add_argument("--tokens", type=at_least(1), default=100_000, metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.repeats, options.tokens)
    show(rows)
    if options.repeats < FEWEST_REPEATS:
        print(f"fewer than {FEWEST_REPEATS} repeats are a trial: nothing is saved")
    else:
        print(f"saved to {save_results(rows, describe_machine('cpu'), 'analysis').relative_to(ROOT)}")


def measure(folder: Path, repeats: int, tokens: int) -> list[dict[str, Any]]:
    for name in (MODEL, BASELINE):
        call("train.py", f"configs/{name}.yaml", f"run_dir={folder / name}", f"data.path={folder / 'data'}", *TRAINED)
    studies = {
        "LogitLens": ("logit_lens",),
        "CKA, at every token": ("cka", "--positions", "all"),
        "CKA, at every token, exact too": ("cka", "--positions", "all", "--exact"),
        "CKA, at named entities": ("cka",),
    }
    sides = ("--checkpoint", str(folder / MODEL), "--baseline", str(folder / BASELINE))
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in studies}
    for _ in track(range(repeats), description="studies"):
        for name, study in studies.items():
            found = call("-m", "eval", *study, *sides, "--tokens", str(tokens), "--out", str(folder / "out"))
            taken[name].append(found)
    return [
        {
            "name": name,
            "tokens": tokens,
            "median_s": statistics.median(seconds for seconds, _ in each),
            "slowest_s": max(seconds for seconds, _ in each),
            "peak_bytes": max(peak for _, peak in each),
            "target_s": TARGET_SECONDS,
            "target_bytes": TARGET_BYTES,
            "repeats": repeats,
        }
        for name, each in taken.items()
    ]


def call(*arguments: str) -> tuple[float, int]:
    """Seconds of a Python process and the most memory that it occupied, in bytes."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    # Linux counts in units of 1,024 bytes.
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "median", "slowest", "memory", "at most", box=None, header_style="bold")
    for row in rows:
        table.add_row(
            f"{row['name']}, {row['tokens']:,} tokens",
            f"{row['median_s']:.1f} s",
            f"{row['slowest_s']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{TARGET_SECONDS} s, {TARGET_BYTES / 1e9:g} GB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
