"""Options of tasks that compare two recipes, each with runs of several seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_machine, count, level, seed
from eval.output import check_out


def add_sides(parser: argparse.ArgumentParser) -> None:
    runs = "checkpoints or run folders that differ in their seeds"
    parser.add_argument("--checkpoint", required=True, nargs="+", metavar="DIR", help=runs)
    parser.add_argument("--baseline", nargs="+", default=[], metavar="DIR", help=f"what to compare with: {runs}")
    parser.add_argument("--name", default="model", help="what to call the checkpoints (default model)")
    parser.add_argument("--baseline-name", default="baseline", metavar="NAME", help="(default baseline)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of tables, figures and page")
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the first model was trained on")
    parser.add_argument(
        "--tokens", type=count, default=100_000, metavar="N", help="validation tokens to read (default 100000)"
    )
    parser.add_argument("--level", type=level, default=0.9, metavar="P", help="of the intervals (default 0.9)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    add_machine(parser)


def sides_of(options: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Paths by the name of their side. Raises UserError for equal names, and for an --out that is a file."""
    if options.baseline and options.name == options.baseline_name:
        raise UserError(f"both sides are called {options.name!r}: give another --name or --baseline-name")
    check_out(options.out)
    sides: dict[str, Sequence[str]] = {options.name: options.checkpoint}
    return sides | ({options.baseline_name: options.baseline} if options.baseline else {})
