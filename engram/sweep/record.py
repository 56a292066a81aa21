"""One run's folder as one row of the table: counts from its config, losses from its metrics, provenance."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram.config import Config, NgramConfig, load_config
from engram.config_identity import run_id
from engram.model.accounting import count_flops, count_parameters, rho, table_rows
from engram.sweep.allocation import achieved
from engram.sweep.pool import damage
from engram.sweep.spec import SweepError
from engram.sweep.tail import number

# `failed`: the run diverged, or its validation loss is not finite. `missing`: not trained, or still in training.
Status = Literal["done", "failed", "missing"]


@dataclass(frozen=True)
class Record:
    """What a run's folder says: its config, whole lines of metrics, and the JSON files (empty where there is none)."""

    status: Status
    config: Config
    metrics: list[dict[str, Any]]
    done: dict[str, Any]
    start: dict[str, Any]

    @property
    def data(self) -> str | None:
        """Digests of the documents that it was trained on and of their tokenizer; None where they were not noted."""
        found = [str(self.start[name])[:12] for name in ("data_digest", "tokenizer_digest") if name in self.start]
        return " ".join(found) or None


def read_record(folder: Path, expected: str) -> Record:
    """Read a run folder, or the copy of its small files. Raises SweepError: damaged, or not the run `expected`."""
    config = load_config(folder / "config.yaml")
    found = run_id(config)
    if found != expected:
        raise SweepError(
            f"{folder}: its config.yaml is that of run {found}, but the folder is named as run {expected}: it was "
            "edited or copied from elsewhere; move the folder away, and the run is trained anew"
        )
    if (folder / "done.json").exists() and (wrong := damage(folder)):
        raise SweepError(wrong)
    done = _json(folder / "done.json")
    starts = _json(folder / "code.json").get("starts") or [{}]
    finite = number(done.get("val_loss")) is not None
    metrics = read_metrics(folder / "metrics.jsonl")
    return Record("done" if finite else "failed", config, metrics, done, starts[0])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; a last line that was cut off is dropped. Raises SweepError for a damaged one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise SweepError(f"{path}: cannot be read ({error.strerror}): a run has its metrics there") from None
    # What follows the last line feed is empty, or cut off.
    return [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines[:-1], start=1)]


def columns(config: Config, record: Record | None) -> dict[str, Any]:
    """Fixed columns of a run's row, in order; losses and provenance are None for a run that is missing (no record)."""
    return {**_counts(config), **_losses(record), **_provenance(record)}


def curve(record: Record) -> list[dict[str, Any]]:
    """One row for each logged step."""
    keys = ("loss", "val_loss", "lr", "grad_norm")
    return [
        {"step": line["step"], "tokens": line.get("tokens"), **{key: number(line.get(key)) for key in keys}}
        for line in record.metrics
    ]


def _counts(config: Config) -> dict[str, Any]:
    model, counts = config.model, count_parameters(config.model)
    tables: NgramConfig | None = model.memory or model.over_encoding
    tokens = config.train.steps * config.tokens_per_step
    flops = count_flops(model, config.data.sequence_length).training
    accounting = achieved(model, model)
    return {
        "steps": config.train.steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / (counts.total + counts.vocabulary),
        "total": counts.total,
        "activated": counts.activated,
        "memory": counts.memory,
        "sparse": counts.sparse,
        "vocabulary": counts.vocabulary,
        "total_as_paper": accounting.paper_total,
        "activated_as_paper": accounting.paper_activated,
        "rho_counted": rho(model),
        "experts": model.moe.num_experts if model.moe else 0,
        "rows": table_rows(model),
        # As configured, of the shortest n-grams; `rows` has those of all tables, after they became primes.
        "rows_per_head": tables.rows_per_head[0] if tables else 0,
        "d_mem": tables.d_mem if tables else 0,
        "shared_dim": model.moe.shared_width if model.moe else 0,
        "ffn_dim": model.dense_width,
        "flops_per_token": flops,
        "training_flops": float(tokens * flops),
    }


def _losses(record: Record | None) -> dict[str, Any]:
    names = ("train_loss", "val_loss", "val_loss_best", "seconds", "tokens_per_second")
    if record is None or record.status != "done":
        return dict.fromkeys(names)
    done = record.done
    seconds, tokens = _seconds(record.metrics)
    found = (
        number(done.get("loss")),
        done["val_loss"],
        number(done.get("best_val_loss")),
        seconds,
        tokens / seconds if seconds else None,
    )
    return dict(zip(names, found, strict=True))


def _seconds(metrics: list[dict[str, Any]]) -> tuple[float | None, int]:
    """Seconds of training, without evaluation and saving, and the tokens that they were spent on."""
    seconds, spent, before = 0.0, 0, 0
    for line in metrics:
        speed, tokens = number(line.get("tokens_per_second")), line.get("tokens", before)
        if speed:
            seconds += (tokens - before) / speed
            spent += tokens - before
        before = tokens
    return (seconds or None), spent


def _provenance(record: Record | None) -> dict[str, Any]:
    start = record.start if record else {}
    commit = start.get("commit")
    return {
        # Like git's own `-dirty`.
        "commit": f"{commit}-modified" if commit and start.get("uncommitted_sha256") else commit,
        "machine": start.get("machine") or start.get("cpu"),
        "torch": start.get("torch"),
    }


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises SweepError: damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise SweepError(f"{path}: is damaged: repair it, or remove the run's folder and train it anew")
    return content


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        raise SweepError(f"{where} is not JSON: repair or remove that line") from None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise SweepError(f"{where} is no object with a step: repair or remove that line")
    return found
