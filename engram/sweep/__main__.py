"""The command line of sweeps: python -m engram.sweep COMMAND SWEEP.yaml"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from engram.config_file import UserError

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
examples:
  python -m engram.sweep plan configs/sweep/study.yaml
  python -m engram.sweep run configs/sweep/study.yaml --jobs 2
  python -m engram.sweep status configs/sweep/study.yaml --watch
  python -m engram.sweep collect configs/sweep/study.yaml
  python -m engram.sweep fit configs/sweep/study.yaml
  python -m engram.sweep report configs/sweep/study.yaml

A run is named by its settings: what several sweeps ask for is trained once, and `run` after an interruption goes on
where things stood. What failed by itself, or was killed, waits for `retry`. pool and out are relative to the folder
that the command is called from.

exit status:
  0    done
  1    some runs failed (the others were finished)
  2    the sweep's file, or what it finds, cannot be used (the message says what to change)
  130  interrupted: running trainings saved their state, and the same command goes on
"""


# Columns of what is not read on a terminal.
_PIPE_WIDTH = 200


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m engram.sweep",
        description="Plan, run, fit and report grids of training runs; configs/sweep/README.md explains the file.",
        epilog=EPILOG,
        formatter_class=layout,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        below = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        below.add_argument("sweep", metavar="SWEEP", help="the sweep's YAML file")
        if name not in ("collect", "fit", "report"):
            below.add_argument("--part", help="only this part of the sweep")
        below.set_defaults(command=command)
        return below

    def add_jobs(below: argparse.ArgumentParser) -> None:
        below.add_argument("--jobs", type=_at_least_one, default=1, metavar="N", help="runs at a time (default: 1)")

    planned = add("plan", plan, "show every point with its counts, cost and time, and spend nothing")
    planned.add_argument("--ids", action="store_true", help="also list the runs with their ids")
    add_jobs(planned)
    for below in (
        add("run", run, "train what is not done yet on this machine"),
        add("retry", retry, "train what failed or was lost once more"),
    ):
        add_jobs(below)
        below.add_argument("--fail-fast", action="store_true", help="start nothing more after a run has failed")
        if below.prog.endswith("retry"):
            below.add_argument("--failed", action="store_true", help="failed and lost runs (the default)")
    submitted = add("submit", submit, "train what is not done yet as a Slurm job array")
    submitted.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="submitit's executor (default: slurm)"
    )
    submitted.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    shown = add("status", status, "show which runs are done, running, failed, lost or pending")
    shown.add_argument("--watch", action="store_true", help="keep showing it until nothing is left to do")
    shown.add_argument("--json", action="store_true", help="one JSON object per run instead of a table")
    collected = add("collect", collect, "write one tidy table of all finished runs, and keep their small files")
    collected.add_argument("--require-all", action="store_true", help="fail if a run is missing")
    add("fit", fit, "fit the curves, with intervals and verdicts")
    add("report", report, "write figures and one page with all of it")
    return parser


# Each command imports what it needs, so that `--help` and a mistake in the file are answered at once.


def plan(options: argparse.Namespace) -> int:
    from engram.sweep import plan as planning
    from engram.sweep.grid import expand
    from engram.sweep.pool import Pool
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    runs = expand(sweep, options.part)
    pool = Pool(sweep.pool, sweep.out)
    points = planning.plan(runs)
    console = _console()
    for table in planning.plan_tables(points, planning.speed(runs, pool)[0]):
        console.print(table, "")
    if options.ids:
        for found in runs:
            console.print(f"{found.id}  {found.part}  {found.label}", highlight=False)
    console.print(planning.summary(runs, points, pool, options.jobs), highlight=False, soft_wrap=True)
    return 0


def run(options: argparse.Namespace) -> int:
    from engram.sweep.driver import run_all
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    runs = unique(expand(sweep, options.part))
    return run_all(runs, Pool(sweep.pool, sweep.out), jobs=options.jobs, fail_fast=options.fail_fast)


def retry(options: argparse.Namespace) -> int:
    from engram.sweep.driver import reset, run_all
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    pool = Pool(sweep.pool, sweep.out)
    again = reset(unique(expand(sweep, options.part)), pool)
    if not again:
        print("no run has failed or was lost: nothing to retry", file=sys.stderr)
        return 0
    return run_all(again, pool, jobs=options.jobs, fail_fast=options.fail_fast)


def submit(options: argparse.Namespace) -> int:
    from engram.sweep import slurm
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    runs = unique(expand(sweep, options.part))
    jobs = slurm.submit(
        runs, Pool(sweep.pool, sweep.out), sweep.slurm, cluster=options.cluster, dry_run=options.dry_run
    )
    if not jobs:
        print("no run is pending or lost: nothing to submit", file=sys.stderr)
    for job in jobs:
        print(job)
    return 0


def status(options: argparse.Namespace) -> int:
    from engram.sweep import status as states
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    runs, pool = unique(expand(sweep, options.part)), Pool(sweep.pool, sweep.out)
    if options.json:
        for line in states.as_json(runs, pool):
            print(json.dumps(line))
    elif options.watch:
        states.watch(runs, pool)
    else:
        console = _console()
        console.print(states.table(runs, pool))
        console.print(states.summary(runs, pool), highlight=False)
    return 0


def collect(options: argparse.Namespace) -> int:
    from engram.sweep import collect as collecting
    from engram.sweep.grid import expand
    from engram.sweep.spec import SweepError, load_sweep

    sweep = load_sweep(options.sweep)
    collected = collecting.collect(sweep, expand(sweep))
    print(collected.says)
    if options.require_all and collected.missing:
        raise SweepError(f"{sweep.out}: {len(collected.missing)} runs are missing, and --require-all asks for all")
    return 0


def fit(options: argparse.Namespace) -> int:
    from engram.sweep import study
    from engram.sweep.spec import load_sweep

    sweep = load_sweep(options.sweep)
    study.print_fits(study.write_fits(sweep), _console())
    return 0


def report(options: argparse.Namespace) -> int:
    from engram.sweep import report as reporting
    from engram.sweep.spec import load_sweep

    print(reporting.write(load_sweep(options.sweep)))
    return 0


def _console() -> "Console":
    """As wide as the terminal; wide enough for every table where the output goes to a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, but must be a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
