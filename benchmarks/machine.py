"""What a measurement must say about where it was taken."""

import argparse
import datetime
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engram.training.provenance import cpu_name

# Fewer repeats are a trial: they prove nothing, and nothing of them is kept.
FEWEST_REPEATS = 5
RESULTS = Path(__file__).parent / "results"


def describe_machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "machine": name,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of a command-line argument that counts something."""

    def count(text: str) -> int:
        if (value := int(text)) < smallest:
            raise argparse.ArgumentTypeError(f"is {value}, but must be at least {smallest}")
        return value

    # What argparse calls it where the text is no number.
    count.__name__ = "int"
    return count


def save_results(rows: list[dict[str, Any]], machine: dict[str, Any], part: str) -> Path:
    """One JSON line per row, the machine's description repeated in each."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
    path = RESULTS / f"{part}_{slug}_{machine['threads']}t_{machine['date']}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({**machine, **row}) + "\n" for row in rows))
    return path
