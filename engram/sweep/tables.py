"""Tables of a study on disk: CSV for people, parquet for whatever reads them again; whole or absent."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engram.sweep.spec import SweepError

Row = dict[str, Any]

# Columns of runs.{csv,parquet}: one row for each run of each part. The axes stand between the two halves.
WHO = {"part": pa.string(), "run_id": pa.string(), "seed": pa.int64(), "status": pa.string()}
WHAT = {
    **dict.fromkeys(("steps", "tokens"), pa.int64()),
    # Training tokens over all parameters, the vocabulary's included.
    "tokens_per_parameter": pa.float64(),
    **dict.fromkeys(("total", "activated", "memory", "sparse", "vocabulary"), pa.int64()),
    # In the paper's accounting, which leaves out what memory adds besides its tables.
    **dict.fromkeys(("total_as_paper", "activated_as_paper"), pa.int64()),
    "rho_counted": pa.float64(),
    **dict.fromkeys(("experts", "rows", "rows_per_head", "d_mem", "shared_dim", "ffn_dim"), pa.int64()),
    # Of training: forward and backward.
    "flops_per_token": pa.int64(),
    "training_flops": pa.float64(),
    # Nats per token; `val_loss` of the last evaluation.
    **dict.fromkeys(("train_loss", "val_loss", "val_loss_best"), pa.float64()),
    **dict.fromkeys(("seconds", "tokens_per_second"), pa.float64()),
    **dict.fromkeys(("commit", "machine", "torch"), pa.string()),
}
# Columns of curves.parquet: one row for each logged step of each run.
CURVE = {
    "run_id": pa.string(),
    **dict.fromkeys(("step", "tokens"), pa.int64()),
    **dict.fromkeys(("loss", "val_loss", "lr", "grad_norm"), pa.float64()),
}


_WRITE = "python -m engram.sweep collect SWEEP.yaml writes it"


def axis_column(axis: str) -> str:
    """The axis' own name, with a prefix where a fixed column has that name."""
    return f"axis.{axis}" if axis in WHO or axis in WHAT else axis


def axis_cell(value: Any) -> str | int | float:
    """Numbers as they are; everything else as YAML would write it on one line."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return value if isinstance(value, str) else json.dumps(value)


def write_runs(rows: Sequence[Row], axes: Sequence[str], folder: Path) -> None:
    """`folder/runs.csv` and `folder/runs.parquet`; `axes` are columns, empty in the rows of parts without such an axis.

    An axis whose values are not all numbers is text throughout.
    """
    types = {axis: _axis_type([row[axis] for row in rows if row.get(axis) is not None]) for axis in axes}
    schema = {**WHO, **types, **WHAT}
    text = [axis for axis, kind in types.items() if kind == pa.string()]
    shown = [{**row, **{axis: str(row[axis]) for axis in text if row.get(axis) is not None}} for row in rows]
    _write_parquet(shown, schema, folder / "runs.parquet")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(schema), lineterminator="\n")
    writer.writeheader()
    writer.writerows(shown)
    write_whole(folder / "runs.csv", buffer.getvalue().encode())


def write_curves(rows: Sequence[Row], folder: Path) -> None:
    _write_parquet(rows, CURVE, folder / "curves.parquet")


def read_table(path: Path, columns: Iterable[str] = ()) -> list[Row]:
    """Rows of a parquet table, in its order. Raises SweepError: `collect` has not written it, or not these columns."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise SweepError(f"{path}: is missing: {_WRITE}") from None
    except (OSError, pa.ArrowException) as error:
        raise SweepError(
            f"{path}: cannot be read ({error}): write it anew with python -m engram.sweep collect"
        ) from None
    if lacking := [name for name in columns if name not in table.column_names]:
        raise SweepError(f"{path}: has no column {lacking[0]}: write it anew with python -m engram.sweep collect")
    return table.to_pylist()


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` in one step, or leave it untouched where it holds these bytes. Raises SweepError."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            building.write_bytes(content)
            building.replace(path)
        finally:
            building.unlink(missing_ok=True)
    except OSError as error:
        raise SweepError(
            f"{path}: cannot be written ({error.strerror}): name another folder as the sweep's `out`"
        ) from None


def _axis_type(values: Sequence[str | int | float]) -> pa.DataType:
    if any(isinstance(value, str) for value in values):
        return pa.string()
    return pa.float64() if any(isinstance(value, float) for value in values) else pa.int64()


def _write_parquet(rows: Sequence[Row], schema: Mapping[str, pa.DataType], path: Path) -> None:
    table = pa.table(
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in schema.items()}, pa.schema(schema)
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_whole(path, sink.getvalue().to_pybytes())
