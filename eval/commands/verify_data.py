"""`python -m eval verify-data`: which of the paper's benchmarks are present, missing, unobtainable or altered."""

import argparse
from pathlib import Path

from engram.config import UserError

HELP = "which of the paper's benchmarks are present, missing, unobtainable or altered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of benchmarks (default data/benchmarks)")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from eval.benchmarks.catalogue import FOLDER
    from eval.benchmarks.verify import verify

    folder = options.data or FOLDER
    if options.data and not folder.is_dir():
        raise UserError(f"{folder}: is no folder: name that of the benchmarks with --data")
    found = verify(folder)
    table = Table("benchmark", "status", "detail", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.name, one.status, one.detail)
    console = Console(highlight=False, markup=False)
    console.print(table)
    counts = {status: sum(one.status == status for one in found) for status in dict.fromkeys(o.status for o in found)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if altered := [one.name for one in found if one.status == "altered"]:
        raise UserError(f"{', '.join(altered)}: not as the manifest says: add the data again (python -m eval add-data)")
