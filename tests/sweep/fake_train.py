"""Stands in for train.py: does at once what the config's `eval.prompt` says, and notes in a ledger that it was called.

Prompts: `sleep SECONDS`, `fail`, `diverge`, `stop` (ends without finishing).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main(path: str, *overrides: str) -> int:
    config = yaml.safe_load(Path(path).read_text())
    folder, (what, *rest) = Path(config["run_dir"]), config["eval"]["prompt"].split()
    folder.mkdir(parents=True, exist_ok=True)
    note(folder, "start", *overrides, f"OMP={os.environ.get('OMP_NUM_THREADS')}")
    (folder / "config.yaml").write_text(Path(path).read_text())
    signal.signal(signal.SIGINT, lambda number, frame: interrupted(folder))
    print("the fake trainer speaks", flush=True)
    if what == "fail":
        print("error: it was told to fail", flush=True)
        return 2
    if what == "diverge":
        return 3
    steps, seconds = config["train"]["steps"], float(rest[0]) if rest else 0.0
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * 64, "loss": 5 - step / 10, "tokens_per_second": 100.0}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(seconds / steps)
    if what != "stop":
        done = {"step": steps, "val_loss": 4.0 + config["seed"] / 100}
        (folder / "done.json").write_text(json.dumps(done))
    note(folder, "end")
    return 0


def note(folder: Path, *words: str) -> None:
    with open(folder.parent / "ledger", "a") as ledger:
        ledger.write(" ".join([folder.name, *words]) + "\n")


def interrupted(folder: Path) -> None:
    note(folder, "saved")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
