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
    """One scored item: `id` is equal for the same question to any model, so that two models can be paired by it."""

    task: str
    id: str
    metric: str
    value: float
    group: str = ""


def summarise(items: Iterable[Item], **settings: Any) -> list[Metric]:
    """The mean of each task's metric over its items, with the standard error of a mean, in order of appearance."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for item in items:
        values.setdefault((item.task, item.metric, item.group), []).append(item.value)
    return [
        Metric(task, metric, *_mean(found), len(found), group, **settings)
        for (task, metric, group), found in values.items()
    ]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


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
