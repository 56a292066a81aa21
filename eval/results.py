"""What an evaluation leaves: one tidy table of metrics, and one row for each item and metric behind them."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engram.training.files import write_atomically
from eval.output import write_provenance

_LOSSES = frozenset(
    ("loss", "document_loss", "document_key_loss", "nats_per_token", "bits_per_byte", "gold_bits_per_byte")
    + ("perplexity", "long_ppl", "byte_perplexity", "word_perplexity")
)


@dataclass(frozen=True)
class Metric:
    """One number about one task: a mean over `n` items with its standard error."""

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    group: str = ""
    num_shots: int = 0
    num_truncated: int = 0
    higher_is_better: bool = True


@dataclass(frozen=True)
class Item:
    """One scored item: `id` is equal for the same question to any model, so that two models can be paired by it.

    `weight`: tokens or bytes, where the value is a mean over them. `unit`: what bootstraps draw, such as a passage that
    several questions are about; empty: the item itself.
    """

    task: str
    id: str
    metric: str
    value: float
    group: str = ""
    weight: float = 1.0
    unit: str = ""


def is_loss(metric: str) -> bool:
    """Whether smaller is better."""
    return metric.partition(",")[0] in _LOSSES


def summarise(items: Iterable[Item], **settings: Any) -> list[Metric]:
    """The weighted mean of each task's metric over its items, with its standard error, in order of appearance."""
    found: dict[tuple[str, str, str], list[Item]] = {}
    for item in items:
        found.setdefault((item.task, item.metric, item.group), []).append(item)
    return [
        Metric(*key[:2], *_mean(own), len(own), key[2], **{"higher_is_better": not is_loss(key[1]), **settings})
        for key, own in found.items()
    ]


def by_unit(items: Iterable[Item]) -> tuple[list[float], list[float]]:
    """Sums of value x weight, and of weights, of each unit that bootstraps draw."""
    sums: dict[str, list[float]] = {}
    for number, item in enumerate(items):
        unit = sums.setdefault(item.unit or f"item {number}", [0.0, 0.0])
        unit[0] += item.value * item.weight
        unit[1] += item.weight
    return [value for value, _ in sums.values()], [weight for _, weight in sums.values()]


def _mean(items: Sequence[Item]) -> tuple[float, float]:
    """The ratio of sums over units, and its standard error."""
    values, weights = by_unit(items)
    n, total = len(values), math.fsum(weights)
    mean = math.fsum(values) / total
    if n < 2:
        return mean, math.nan
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total


def write_results(
    folder: Path, metrics: Sequence[Metric], items: Sequence[Item], provenance: Mapping[str, Any]
) -> None:
    """`metrics.csv`, `items.csv` and `provenance.json` in `folder`, each replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, kind in (("metrics.csv", metrics, Metric), ("items.csv", items, Item)):
        write_atomically(folder / name, _table([asdict(row) for row in rows], [field.name for field in fields(kind)]))
    write_provenance(folder, provenance)


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_tidy(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One Parquet table in which every row tells on its own what was measured, on what, and with which code."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
