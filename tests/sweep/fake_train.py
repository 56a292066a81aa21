"""Stands in for train.py: does at once what the config's `eval.prompt` says, and notes in a ledger that it was called.

Prompts: `sleep SECONDS`, `fail`, `mute` (fails without a word), `diverge`, `stop` (ends without finishing), `die` (by a
signal), `hang` (hears no SIGINT), `slow` (takes a second to save, and hears a second SIGINT meanwhile), `crash` (an
abort), `broken` (fails on GPU 5), `early` (a traceback at the first SIGINT), `checkpoint SECONDS` (saves its last
step, goes on from there, and refuses to finish without the metrics of that step, as train.py does).
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
    handler = signal.SIG_IGN if what == "hang" else lambda number, frame: interrupted(folder, what)
    signal.signal(signal.SIGINT, handler)
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    note(folder, "start", *overrides, *(f"{name}={os.environ.get(name)}" for name in names))
    (folder / "config.yaml").write_text(Path(path).read_text())
    if what == "mute":
        return 1
    print("the fake trainer speaks", flush=True)
    if what == "fail":
        print("error: it was told to fail", flush=True)
        return 2
    if what == "diverge":
        return 3
    if what == "broken" and os.environ["CUDA_VISIBLE_DEVICES"] == "5":
        return 1
    if what == "crash":
        os.abort()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    steps = config["train"]["steps"]
    seconds = 60.0 if what in ("hang", "slow", "early") else float(rest[0]) if rest else 0.0
    latest, metrics = folder / "latest", folder / "metrics.jsonl"
    with open(metrics, "a") as file:
        for step in range(1 + (int(latest.read_text()) if latest.exists() else 0), steps + 1):
            line = {"step": step, "tokens": step * 64, "loss": 5 - step / 10, "tokens_per_second": 100.0}
            file.write(json.dumps(line) + "\n")
            file.flush()
            time.sleep(seconds / steps)
    if what == "checkpoint":
        folder.mkdir(exist_ok=True)
        latest.write_text(str(steps))
        if not metrics.exists() or f'"step": {steps},' not in metrics.read_text():
            print("error: remove what is left of it, and train the run anew", flush=True)
            return 2
    if what != "stop":
        done = {"step": steps, "val_loss": 4.0 + config["seed"] / 100}
        (folder / "done.json").write_text(json.dumps(done))
    note(folder, "end")
    return 0


def note(folder: Path, *words: str) -> None:
    with open(folder.parent / "ledger", "a") as ledger:
        ledger.write(" ".join([folder.name, *words]) + "\n")


def interrupted(folder: Path, what: str) -> None:
    if what == "early":
        raise ImportError("half of a library")
    if what == "slow":
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(1))
        time.sleep(1)
    note(folder, "saved")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
