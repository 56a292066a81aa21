"""`python train.py CONFIG --dry-run`: the plan of a run on a cluster that is not there, and what it costs.

The same text heads the log of a run on several ranks. Nothing here needs torch, data or a device.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from engram.distributed.machine import Machine

if TYPE_CHECKING:
    from rich.console import Console

    from engram.distributed.plan import Plan

# Where there is no terminal.
_WIDTH = 120
_SPEEDS = {
    "device_tflops": "TFLOP/s of matrix products",
    "device_gb": "GB of a device's memory",
    "link_gbps": "Gbit/s to other ranks",
    "host_gbps": "Gbit/s to host memory",
    "file_gbps": "Gbit/s to a file",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--dry-run, and the size and speed of the cluster."""
    group = parser.add_argument_group("plan of a run that is not started")
    group.add_argument(
        "--dry-run", action="store_true", help="print who holds what, memory and traffic, and exit: 0, or 2 if refused"
    )
    group.add_argument("--ranks", type=_count, default=1, metavar="N", help="ranks, one for each device (1)")
    for name, meaning in _SPEEDS.items():
        default: float = getattr(Machine, name)
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=_positive, default=default, metavar="X", help=f"{meaning} ({default:g})")


def unasked(options: argparse.Namespace) -> str | None:
    """The first of the plan's options that was given though no plan was asked for."""
    given = {"ranks": 1} | {name: getattr(Machine, name) for name in _SPEEDS}
    wrong = [name for name, default in given.items() if getattr(options, name) != default]
    return None if options.dry_run or not wrong else f"--{wrong[0].replace('_', '-')}"


def dry_run(options: argparse.Namespace) -> int:
    """Print what `add_options` promised; returns the exit status."""
    from rich.console import Console

    from engram.config import UserError, load_config
    from engram.distributed.plan import make_plan

    try:
        plan = make_plan(load_config(options.config, options.overrides), options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    show(plan, Machine(**{name: getattr(options, name) for name in _SPEEDS}), console)
    return 0


def describe(plan: "Plan", machine: Machine) -> str:
    """What `show` prints, as plain text."""
    from rich.console import Console

    text = StringIO()
    show(plan, machine, Console(file=text, width=_WIDTH, highlight=False), judge=False)
    return text.getvalue().rstrip()


def show(plan: "Plan", machine: Machine, console: "Console", judge: bool = True) -> None:
    """The plan, the fullest rank's memory, traffic of a step, and whether fetching rows hides behind computing.

    `judge`: say whether memory suffices, which a run has found out about its own device before.
    """
    stage = f", ZeRO {plan.settings.zero_stage}" if plan.config.distributed else ""
    console.print(
        f"{plan.ranks} rank{'s' * (plan.ranks > 1)}{stage}, each with {plan.sequences} of "
        f"{plan.config.train.batch_size} sequences of {plan.config.data.sequence_length:,} tokens in "
        f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}\n"
    )
    _show_backbone(plan, console)
    _show_tables(plan, console)
    _show_memory(plan, machine if judge else None, console)
    _show_traffic(plan, console)
    _show_windows(plan, machine, console)
    speeds = ", ".join(f"{getattr(machine, name):g} {meaning}" for name, meaning in _SPEEDS.items())
    console.print(
        f"Taken for granted: {speeds}. Estimates of rows: Zipf's law; of tokens to experts: all choices equally likely."
    )


def _show_backbone(plan: "Plan", console: "Console") -> None:
    stage = plan.settings.zero_stage
    rows = []
    for group in plan.groups:
        # From which stage on ZeRO divides weights, gradients and optimizer state.
        held = (group.parts * (group.holders if stage >= first else 1) for first in (3, 2, 1))
        rows.append((group.name, f"{group.elements:,}", *("all" if ranks == 1 else f"1 / {ranks}" for ranks in held)))
    heads = ("", "parameters", "weights", "gradients", "optimizer state")
    _show(console, "Backbone, and what of it a rank holds", heads, rows)


def _show_tables(plan: "Plan", console: "Console") -> None:
    storage, kind = plan.config.train.tables, plan.config.optim.table.kind
    where = {"host": "host memory", "file": "file"}[storage.tier] if storage else "device"
    shown = sorted({0, plan.ranks - 1})
    rows = []
    for table in plan.tables:
        held = (table.ranges[rank] for rank in shown)
        ranges = (f"{each.start:,} to {each.stop - 1:,}" if each else "none" for each in held)
        width = f"{table.settings.head_dim} {table.settings.table_dtype}"
        rows.append((table.name, f"{table.num_rows:,}", width, where, *ranges, kind))
    heads = ("", "rows", "width", "where", *(f"rows of rank {rank}" for rank in shown), "optimizer")
    if rows:
        _show(console, "N-gram tables; optimizer state lies beside their rows", heads, rows)


def _show_memory(plan: "Plan", machine: Machine | None, console: "Console") -> None:
    from engram.distributed.accounting import Held, held_by

    fullest = max(range(plan.ranks), key=lambda rank: sum(each.device for each in held_by(plan, rank)))
    held = held_by(plan, fullest)
    places = ("parameters", "gradients", "state", "passing", "host", "file")
    total = Held("all", **{name: sum(getattr(each, name) for each in held) for name in places})
    used = [name for name in places if getattr(total, name)]
    unit, size = _unit([total.device, total.host, total.file])
    rows = [(each.name, *(size(getattr(each, name)) for name in used), size(each.device)) for each in [*held, total]]
    title = f"Memory of rank {fullest}, which holds most, in {unit}"
    if machine is not None:
        fits = "fits into" if total.device <= machine.device_gb * 1e9 else "does not fit into"
        title += f"; it {fits} a device of {machine.device_gb:g} GB"
    heads = ("", *("for a while" if name == "passing" else name for name in used), "on the device")
    _show(console, title, heads, rows)
    if machine is not None and total.device > machine.device_gb * 1e9:
        console.print(
            "A rank holds less with more ranks, a higher distributed.zero_stage, distributed.offload_optimizer, "
            "distributed.table_ranks or train.tables.\n"
        )


def _show_traffic(plan: "Plan", console: "Console") -> None:
    from engram.distributed.traffic import sent_by

    if sent := sent_by(plan):
        unit, size = _unit([each.at_most for each in sent])
        rows = [(each.name, size(each.at_most), size(each.estimate)) for each in sent]
        _show(console, f"Sent by a rank in a step, mean over ranks, in {unit}", ("", "at most", "estimate"), rows)


def _show_windows(plan: "Plan", machine: Machine, console: "Console") -> None:
    from engram.distributed.traffic import windows

    rows = [
        (each.name, *(f"{1000 * time:,.3g}" for time in (each.compute, each.at_most, each.estimate)), each.verdict)
        for each in windows(plan, machine)
    ]
    if rows:
        heads = ("", "computing meanwhile", "fetching, at most", "estimate", "")
        _show(console, "Whether rows of tables are fetched behind computing, in ms", heads, rows)


def _show(console: "Console", title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold")
    console.print(table, "", sep="\n")


def _unit(sizes: list[float]) -> tuple[str, Callable[[float], str]]:
    """GB or MB, whichever shows the largest of all sizes, and how to write a size in it."""
    unit, divisor = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    return unit, lambda size: f"{size / divisor:,.3f}" if size else "-"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks: give 1 or more")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
