"""Run folders as training leaves them, with losses that the test chose."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram.config import save_config
from engram.model.accounting import rho, table_rows
from engram.sweep.grid import Run
from engram.sweep.record import columns
from engram.sweep.spec import Sweep
from engram.sweep.tables import Row, axis_cell, axis_column, write_curves, write_runs
from tests.sweep.build import make_sweep

CODE = {"commit": "0123456789abcdef", "uncommitted_sha256": None, "machine": "a processor", "torch": "2.13.0"}

# A study with one part for each view, over a model whose seeds lie apart by much more than its points do.
SEED_LEVELS = {0: -0.03, 1: 0.05, 2: -0.02}
NOISE = 0.002
VARIANTS = {"full": 0.0, "no memory": 0.12, "no conv": 0.0005, "no gate": 0.02}
LAYERS = {"0": 0.01, "1": -0.03, "2": 0.04}
PARTS: dict[str, Any] = {
    "curve": {
        "derive": "allocation",
        "paper": "allocation",
        "axes": {
            "budget": {"deep": {"optim.lr": 0.01}, "flat": {"optim.lr": 0.02}},
            "rho": [1, 0.875, 0.75, 0.625, 0.5, 0.375],
        },
    },
    "growth": {
        "derive": "memory",
        "paper": "memory_scaling",
        "axes": {
            "tables": {
                "engram": {},
                "averaged": {
                    "model.memory": None,
                    "model.over_encoding": {"num_heads": 2, "head_dim": 8, "rows_per_head": 2},
                },
            },
            "rows": [0, 50, 200, 1000, 4000],
        },
    },
    # Told apart by a setting that means nothing here, so that each variant is a run of its own.
    "changes": {
        "view": "bars",
        "paper": "ablations",
        "axes": {"variant": {name: {"optim.weight_decay": 0.2 + at / 100} for at, name in enumerate(VARIANTS)}},
    },
    "place": {
        "view": "lines",
        "paper": "layers",
        "axes": {"layer": {name: {"model.memory.layer_ids": [int(name)]} for name in LAYERS}},
        "reference": {"part": "changes", "variant": "no memory"},
    },
    "later": {"view": "lines", "axes": {"optim.lr": [0.5, 0.25]}},
}


def deep(share: float) -> float:
    """The planted curve of the budget `deep`, with its minimum at 0.644."""
    return 0.1 * (0.1 + share) ** -0.8 + 0.03 * (1.1 - share) ** -1.0


def growth(rows: int) -> float:
    return -0.04 * math.log10(rows) if rows else 0.0


def planted_loss(run: Run) -> float | None:
    model, level = run.config.model, SEED_LEVELS[run.seed]
    noise = float(np.random.default_rng([*run.id.encode()]).normal(0, NOISE))
    if run.part == "curve":
        # Of the flat budget, only noise tells ratios apart.
        return 4 + level + noise + (deep(rho(model)) if run.point["budget"] == "deep" else noise)
    if run.part == "growth":
        return 5 + level + growth(table_rows(model)) + (0.03 if model.over_encoding else 0)
    if run.part == "changes":
        return 6 + level + VARIANTS[run.point["variant"]] + noise
    if run.part == "place":
        return 6 + level + LAYERS[run.point["layer"]] + noise
    return None


def make_study(folder: Path, **parts: Any) -> Sweep:
    """The study's sweep, or one of other `parts`; nothing is trained yet."""
    return make_sweep(folder, name="planted", seeds=[0, 1, 2], overrides={"train.steps": 8}, parts=parts or PARTS)


def plant(folder: Path, run: Run, loss: float, evaluations: int = 4) -> None:
    """A finished run in `folder/<id>`: evaluated at even distances, falling to `loss`, at 1000 tokens per second."""
    below = folder / run.id
    below.mkdir(parents=True)
    save_config(run.config, below / "config.yaml")
    steps, per_step = run.config.train.steps, run.config.tokens_per_step
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * per_step, "loss": loss + 2.0 / step, "lr": 0.01, "grad_norm": 0.5}
        if step * evaluations % steps < evaluations:
            line["val_loss"] = loss + 1.0 / step - 1.0 / steps
        lines.append({**line, "tokens_per_second": 1000.0})
    (below / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (below / "code.json").write_text(json.dumps({"starts": [{"run_id": "x", **CODE}]}))
    last = {key: lines[-1][key] for key in ("step", "tokens", "loss")}
    done = {**last, "val_loss": loss, "best_val_loss": loss, "best_step": steps, "skipped_steps": 0}
    (below / "done.json").write_text(json.dumps(done))


def plant_all(folder: Path, runs: Iterable[Run], loss: Callable[[Run], float | None] = planted_loss) -> None:
    """Every run for which `loss` says a number; those of several parts once."""
    for run in {run.id: run for run in runs}.values():
        planted = loss(run)
        if planted is not None:
            plant(folder, run, planted)


def write_tables(sweep: Sweep, runs: Sequence[Run], loss: Callable[[Run], float | None] = planted_loss) -> None:
    """What `collect` would write of planted runs, without the folders; a run of infinite loss has diverged."""
    rows: list[Row] = []
    curves: dict[str, list[Row]] = {}
    for run in runs:
        planted = loss(run)
        status = "missing" if planted is None else "done" if math.isfinite(planted) else "failed"
        row: Row = {"part": run.part, "run_id": run.id, "seed": run.seed, "status": status}
        row |= {axis_column(axis): axis_cell(value) for axis, value in run.point.items()}
        row |= columns(run.config, None)
        if status == "done":
            row |= {"val_loss": planted, "train_loss": planted, "commit": CODE["commit"], "seconds": 1.0}
            tokens, per_step = row["tokens"], run.config.tokens_per_step
            curves[run.id] = [
                {
                    "run_id": run.id,
                    "step": at // per_step,
                    "tokens": at,
                    "loss": planted + 1,
                    "val_loss": planted + 9 / at,
                }
                for at in range(per_step, tokens + 1, per_step)
            ]
        rows.append(row)
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_runs(rows, list(dict.fromkeys(axis_column(axis) for run in runs for axis in run.point)), sweep.out)
    write_curves([line for lines in curves.values() for line in lines], sweep.out)


def table_row(part: str, seed: int, loss: float | None, **point: Any) -> Row:
    """A run of a part of axes that are no columns; without a loss it has diverged."""
    status = "failed" if loss is None else "done"
    return {
        "part": part,
        "seed": seed,
        "run_id": f"{point.get('v')}-{seed}",
        "status": status,
        "val_loss": loss,
        **point,
    }
