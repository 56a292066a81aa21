"""What a sweep would run and cost, before anything is spent."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.filesize import decimal
from rich.table import Table

from engram.model.accounting import count_bytes, count_flops, count_parameters, rho, table_rows
from engram.report.text import counted, duration, short
from engram.sweep.allocation import achieved
from engram.sweep.grid import Run, shown, unique
from engram.sweep.pool import Pool

# Training FLOPs per second that a run is taken to reach where no finished run tells: a thread of a server's processor.
ASSUMED_SPEED = 5e10


@dataclass(frozen=True)
class PlannedPoint:
    """All seeds of one point, and what one of them costs."""

    part: str
    point: dict[str, object]
    runs: tuple[Run, ...]
    # As counted on the config: the experts' share of the sparse parameters, routed experts, rows of all tables.
    rho: float
    experts: int
    rows: int
    total: int
    activated: int
    # Without what memory adds besides its tables, as the paper counts.
    activated_as_paper: int
    tokens: int
    # FLOPs of the whole run; bytes of parameters, gradients and optimizer state.
    flops: float
    bytes: int


def plan(runs: Sequence[Run]) -> list[PlannedPoint]:
    """Points in the order of the runs."""
    grouped = groupby(runs, key=lambda run: (run.part, run.point))
    return [_point(part, point, tuple(seeds)) for (part, point), seeds in grouped]


def speed(runs: Iterable[Run], pool: Pool) -> tuple[float, str]:
    """Training FLOPs per second of one run, the median of finished ones, and the words that say where it comes from."""
    speeds = []
    for run in unique(list(runs)):
        state = pool.state(run)
        if state.status == "done" and state.tokens_per_second:
            per_token = count_flops(run.config.model, run.config.data.sequence_length).training
            speeds.append(state.tokens_per_second * per_token)
    if speeds:
        return statistics.median(speeds), f"the median of {counted(len(speeds), 'finished run')}"
    return ASSUMED_SPEED, "assumed, because no run has finished yet"


def plan_tables(points: Sequence[PlannedPoint], flops_per_second: float) -> Iterator[Table]:
    """A table for each part, with a line for each point; the time is that of one seed."""
    for part, group in groupby(points, key=lambda point: point.part):
        yield _table(part, list(group), flops_per_second)


def summary(runs: Sequence[Run], points: Sequence[PlannedPoint], pool: Pool, jobs: int) -> str:
    """How many runs, how many of them are done, and how long the rest takes with `jobs` at a time."""
    flops_per_second, source = speed(runs, pool)
    once = unique(list(runs))
    left = {run.id for run in once if pool.state(run).status != "done"}
    cost = {run.id: point.flops for point in points for run in point.runs}
    seconds = sum(cost[run] for run in left) / flops_per_second / jobs
    shared = f" ({len(runs) - len(once)} of {len(runs)} are shared by several parts)" if len(once) < len(runs) else ""
    return (
        f"{counted(len(once), 'run')}{shared}, {len(once) - len(left)} done, {len(left)} to go: "
        f"{sum(cost.values()):.1e} FLOPs in all; about {duration(seconds)} for the rest, {jobs} at a time with "
        f"{flops_per_second / 1e9:.0f} GFLOP/s each ({source})"
    )


def _table(part: str, points: Sequence[PlannedPoint], flops_per_second: float) -> Table:
    axes = list(points[0].point)
    table = Table(title=part, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for axis in axes:
        table.add_column(axis)
    for name in (
        "rho",
        "experts",
        "rows",
        "total",
        "activated",
        "as paper",
        "tokens",
        "FLOPs",
        "state",
        "seeds",
        "time",
    ):
        table.add_column(f"{name} counted" if name in axes else name, justify="right")
    for point in points:
        table.add_row(
            *(shown(value) for value in point.point.values()),
            f"{point.rho:.3f}",
            str(point.experts),
            f"{point.rows:,}",
            short(point.total),
            short(point.activated),
            short(point.activated_as_paper),
            short(point.tokens),
            f"{point.flops:.1e}",
            decimal(point.bytes),
            str(len(point.runs)),
            duration(point.flops / flops_per_second),
        )
    return table


def _point(part: str, point: dict[str, object], runs: tuple[Run, ...]) -> PlannedPoint:
    config = runs[0].config
    counts = count_parameters(config.model)
    tokens = config.train.steps * config.tokens_per_step
    return PlannedPoint(
        part=part,
        point=point,
        runs=runs,
        rho=rho(config.model),
        experts=config.model.moe.num_experts if config.model.moe else 0,
        rows=table_rows(config.model),
        total=counts.total,
        activated=counts.activated,
        activated_as_paper=achieved(config.model, config.model).paper_activated,
        tokens=tokens,
        flops=tokens * count_flops(config.model, config.data.sequence_length).training,
        bytes=count_bytes(config.model, config.optim, config.tokens_per_step).total,
    )
