"""How long training stands still for a checkpoint: to write all of it, or to copy it and complete what a thread wrote.

python -m benchmarks.checkpoints [--repeats 5] [--gigabytes 2]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from engram.config import load_config
from engram.data.tokenizer import load_tokenizer
from engram.distributed.world import SINGLE
from engram.training.checkpoint_files import Contents
from engram.training.saver import CheckpointSaver

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/quickstart.yaml"
TEN_GB = 10**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=FEWEST_REPEATS, metavar="N")
    parser.add_argument("--gigabytes", type=at_least(1), default=2, metavar="GB", help="size of the saved state")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = stall_rows(Path(folder), options.repeats, options.gigabytes * 10**9)
    for row in rows:
        print(f"{row['name']}: training stands still for {row['stall_s_per_10_GB']:.2f} s per 10 GB")
    if options.repeats < FEWEST_REPEATS:
        print(f"fewer than {FEWEST_REPEATS} repeats are a trial: nothing is saved")
    else:
        print(f"saved to {save_results(rows, describe_machine('cpu'), 'checkpoints').relative_to(ROOT)}")


def stall_rows(folder: Path, repeats: int, nbytes: int) -> list[dict[str, Any]]:
    config = load_config(CONFIG)
    tensors = {"model": {"weight": torch.randn(nbytes // 16, 4)}, "optim": {}}
    contents = Contents(tensors, {"step": 1}, config, load_tokenizer(ROOT / config.data.path))
    rows = []
    for beside in (False, True):
        stalls = []
        with CheckpointSaver(folder, 1, SINGLE, beside) as saver:
            # The first one allocates the copies.
            for step in range(repeats + 1):
                stalls.append(stall(saver, step, contents))
        name = "checkpoint beside training" if beside else "checkpoint, training waits"
        per_ten_gb = statistics.median(stalls[1:]) * TEN_GB / nbytes
        rows.append({"name": name, "bytes": nbytes, "stall_s_per_10_GB": per_ten_gb, "repeats": repeats})
    return rows


def stall(saver: CheckpointSaver, step: int, contents: Contents) -> float:
    """Seconds in which training does not go on."""
    start = time.perf_counter()
    saver.save(step, contents)
    stood = time.perf_counter() - start
    # Here training would go on.
    while not saver.ready:
        time.sleep(0.01)
    start = time.perf_counter()
    saver.wait()
    return stood + time.perf_counter() - start


if __name__ == "__main__":
    main()
