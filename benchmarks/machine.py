"""What a measurement must say about where it was taken."""

import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from engram.training.run_folder import cpu_name

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


def save_results(rows: list[dict[str, Any]], machine: dict[str, Any], part: str) -> Path:
    """One JSON line per row, the machine's description repeated in each."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
    path = RESULTS / f"{part}_{slug}_{machine['threads']}t_{machine['date']}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({**machine, **row}) + "\n" for row in rows))
    return path
