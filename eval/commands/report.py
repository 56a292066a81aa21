"""`python -m eval report`: one HTML page about a run, or about several side by side."""

import argparse

from eval.commands.options import add_device

HELP = "one HTML page about a run, or about several side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a training run")
    parser.add_argument("--out", metavar="FILE.html", help="default: RUN_DIR/report.html; of several: comparison.html")
    parser.add_argument("--data", metavar="DIR", help="prepared data, if it is no longer where the config says")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.report import print_summary, write_report

    path, runs = write_report(options.run_dirs, options.out, data=options.data, device=options.device)
    print_summary(runs, path, Console())
