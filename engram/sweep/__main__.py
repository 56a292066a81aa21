"""The command line of sweeps: python -m engram.sweep COMMAND SWEEP.yaml"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engram.config_file import UserError
from engram.report.text import counted

if TYPE_CHECKING:
    from rich.console import Console

    from engram.sweep.spec import Sweep

EPILOG = """\
examples:
  python -m engram.sweep plan configs/sweep/study.yaml
  python -m engram.sweep run configs/sweep/study.yaml --jobs 2
  python -m engram.sweep status configs/sweep/study.yaml --watch
  python -m engram.sweep collect configs/sweep/study.yaml
  python -m engram.sweep fit configs/sweep/study.yaml
  python -m engram.sweep report configs/sweep/study.yaml

A run is named by its settings: what several sweeps ask for is trained once, and `run` after an interruption goes on
where things stood, killed trainings included. What failed by itself waits for `retry`. A finished run that has lost
files is `damaged`: it counts as not done, and is left alone until its folder is moved away. pool and out are relative
to the folder that the command is called from.

exit status:
  0    done
  1    some runs failed, were stopped, or are damaged (the others were finished, or collected)
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
        below.add_argument(
            "--jobs",
            type=_at_least_one,
            default=1,
            metavar="N",
            help="runs at a time (default: 1). Each gets its share of the cores as train.threads, unless its config "
            "sets that: a run that goes on under another N is no longer the same to the bit",
        )

    def add_again(below: argparse.ArgumentParser) -> None:
        below.add_argument("--again", action="store_true", help="also what an earlier `submit` has in the queue still")

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
            below.add_argument(
                "--diverged", action="store_true", help="diverged runs as well, which diverge once more, to the bit"
            )
        else:
            add_again(below)
    submitted = add("submit", submit, "train what is not done yet as a Slurm job array")
    submitted.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="submitit's executor (default: slurm)"
    )
    add_again(submitted)
    submitted.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    shown = add("status", status, "show which runs are done, running, failed, damaged, lost or pending")
    shown.add_argument("--watch", action="store_true", help="keep showing it until nothing is left to do")
    shown.add_argument("--json", action="store_true", help="one JSON object per run instead of a table")
    collected = add(
        "collect", collect, "write one tidy table of all finished runs but damaged ones, and keep their small files"
    )
    collected.add_argument("--require-all", action="store_true", help="fail if a run is missing")
    add("fit", fit, "fit the curves, with intervals and verdicts")
    add("report", report, "write figures and one page with all of it")
    return parser


# Each command imports what it needs, so that `--help` and a mistake in the file are answered at once.


def plan(options: argparse.Namespace) -> int:
    from engram.sweep import plan as planning
    from engram.sweep.grid import expand
    from engram.sweep.pool import Pool

    sweep = _load(options)
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

    sweep = _load(options)
    runs, pool = unique(expand(sweep, options.part)), Pool(sweep.pool, sweep.out)
    return run_all(runs, pool, jobs=options.jobs, fail_fast=options.fail_fast, again=options.again)


def retry(options: argparse.Namespace) -> int:
    from engram.sweep.driver import reset, run_all
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool

    sweep = _load(options)
    pool = Pool(sweep.pool, sweep.out)
    again, left = reset(unique(expand(sweep, options.part)), pool, diverged=options.diverged)
    if left:
        print(
            f"{counted(len(left), 'diverged run')} left alone: trained again, each would diverge at the same step; "
            "change its settings (optim.lr, optim.clip_norm), or give --diverged",
            file=sys.stderr,
        )
    if not again:
        print(f"no {'other ' if left else ''}run has failed or was lost: nothing to retry", file=sys.stderr)
        return 1 if left else 0
    return run_all(again, pool, jobs=options.jobs, fail_fast=options.fail_fast)


def submit(options: argparse.Namespace) -> int:
    from engram.sweep import slurm
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool

    sweep = _load(options)
    runs, pool = unique(expand(sweep, options.part)), Pool(sweep.pool, sweep.out)
    submission = slurm.submit(
        runs, pool, sweep.slurm, cluster=options.cluster, dry_run=options.dry_run, again=options.again
    )
    print("\n".join(submission.lines()))
    return 1 if submission.damaged else 0


def status(options: argparse.Namespace) -> int:
    from engram.sweep import status as states
    from engram.sweep.grid import expand, unique
    from engram.sweep.pool import Pool

    sweep = _load(options)
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
    from engram.sweep.spec import SweepError

    sweep = _load(options)
    collected = collecting.collect(sweep, expand(sweep))
    print(collected.says)
    if options.require_all and collected.missing:
        missing = counted(len(collected.missing), "missing run")
        raise SweepError(f"{sweep.out}: {missing}, but --require-all asks for all")
    return 1 if collected.damaged else 0


def fit(options: argparse.Namespace) -> int:
    from engram.sweep import study

    sweep = _load(options)
    study.print_fits(study.write_fits(sweep), _console())
    return 0


def report(options: argparse.Namespace) -> int:
    from engram.sweep import report as reporting

    print(reporting.write(_load(options)))
    return 0


def _load(options: argparse.Namespace) -> "Sweep":
    """The sweep, with a warning where its runs lie in another folder than the one that the command is called from."""
    from engram.sweep.spec import load_sweep, other_folder

    sweep = load_sweep(options.sweep)
    if (folder := other_folder(sweep, Path(options.sweep))) is not None:
        print(
            f"warning: there is no {sweep.pool} or {sweep.out} in this folder, but in {folder} there is, and both are "
            f"relative to where a command is called from: from here, everything is trained again; cd {folder} first",
            file=sys.stderr,
        )
    return sweep


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
