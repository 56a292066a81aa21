"""The paper's own points, digitised from its figures: what our curves stand beside."""

import csv
from importlib.resources import files
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

# x and loss, nats per token, by ascending x.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


class MemoryScaling(TypedDict):
    """Slots and losses beside a fixed backbone, and the loss of the backbone alone."""

    engram: Curve
    over_encoding: Curve
    baseline: float


def allocation() -> dict[str, Curve]:
    """rho and loss for the budgets "2e20" and "6e20" of training FLOPs (Figure 3, left)."""
    rows = _read("allocation")
    budgets = dict.fromkeys(row["budget"] for row in rows)
    return {name: _curve([row for row in rows if row["budget"] == name], "rho") for name in budgets}


def memory_scaling() -> MemoryScaling:
    """Slots and loss of both models (Figure 3, right)."""
    rows = _read("memory_scaling")
    (baseline,) = (float(row["loss"]) for row in rows if row["model"] == "baseline")
    return {
        "engram": _curve([row for row in rows if row["model"] == "engram"], "slots"),
        "over_encoding": _curve([row for row in rows if row["model"] == "over_encoding"], "slots"),
        "baseline": baseline,
    }


def ablations() -> dict[str, float]:
    """Loss minus that of the full model, by the name that our sweep files give the same change (Figure 5)."""
    return {row["variant"]: float(row["delta"]) for row in _read("ablations")}


def layers() -> Curve:
    """Layer of the only module, counted from 0, and loss (Figure 5)."""
    return _curve(_read("layers"), "layer")


def _curve(rows: list[dict[str, str]], x: str) -> Curve:
    return np.array([float(row[x]) for row in rows]), np.array([float(row["loss"]) for row in rows])


def _read(name: str) -> list[dict[str, str]]:
    text = (files("engram.sweep") / "paper_data" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
