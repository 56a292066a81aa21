"""Options of tasks that measure one checkpoint, and another beside it on the same items."""

import argparse
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_machine, level, seed
from eval.output import check_out


def add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder: its latest")
    parser.add_argument("--baseline", metavar="DIR", help="another one, to compare with on the same items")
    parser.add_argument(
        "--match",
        choices=("loss", "flops"),
        help="take, of the run folder --checkpoint, the checkpoint nearest to the end of the run folder --baseline",
    )
    parser.add_argument("--name", default="model", help="what to call the checkpoint (default model)")
    parser.add_argument("--baseline-name", default="baseline", metavar="NAME", help="(default baseline)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of tables, figures and page")
    parser.add_argument("--level", type=level, default=0.9, metavar="P", help="of the intervals (default 0.9)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of items and bootstrap (default 0)")
    add_machine(parser)


def pair_of(options: argparse.Namespace) -> tuple[dict[str, str], str | None]:
    """Checkpoint by name, and how they were matched, where they were.

    Raises UserError: equal names, an --out that is a file, --match without a baseline or without a match.
    """
    from eval.matching import match

    if options.baseline and options.name == options.baseline_name:
        raise UserError(f"both models are called {options.name!r}: give another --name or --baseline-name")
    if options.match and not options.baseline:
        raise UserError(f"--match {options.match} needs another run to match with: give one with --baseline")
    check_out(options.out)
    checkpoints, note = {options.name: options.checkpoint}, None
    if options.baseline:
        checkpoints[options.baseline_name] = options.baseline
    if options.match:
        found = match(options.checkpoint, options.baseline, options.match)
        checkpoints = {options.name: str(found.folder), options.baseline_name: str(found.other)}
        note = f"matched by {options.match}: {found}"
    return checkpoints, note
