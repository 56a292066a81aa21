"""`python -m eval SUITE.yaml`: all tasks of a suite on a checkpoint, on its last N, and beside a baseline."""

import argparse
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_checkpoint, count
from eval.output import check_out

HELP = "all tasks of a suite's file on a checkpoint, and beside a baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="the suite, such as configs/eval/tiny.yaml")
    add_checkpoint(parser)
    parser.add_argument("--baseline", metavar="DIR", help="a checkpoint or run folder to compare with, item by item")
    parser.add_argument(
        "--match",
        choices=("loss", "flops"),
        help="take, of the run folder --checkpoint, the checkpoint nearest to the end of the run folder --baseline",
    )
    parser.add_argument("--last", type=count, default=1, metavar="N", help="the last N checkpoints (default 1)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of results")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="answers that are kept (default OUT/cache.sqlite)")
    parser.add_argument("--run-code", action="store_true", help="allow running programs that the model writes")


def run(options: argparse.Namespace) -> None:
    import sys

    from rich.console import Console

    from eval.suites.settings import load_suite

    suite = load_suite(options.suite)
    check_out(options.out)
    if options.match and (not options.baseline or options.last > 1):
        raise UserError(f"--match {options.match} chooses one checkpoint beside --baseline: give it, without --last")

    from eval import ranks
    from eval.matching import match
    from eval.suites.check import check_suite, check_texts
    from eval.suites.compare import compare, overall
    from eval.suites.page import write_page
    from eval.suites.run import Options, checkpoints, run_suite

    # Bound to this stream: while lm-eval runs, its own lines are kept off the terminal.
    console = Console(file=sys.stderr)
    sides = {"model": options.checkpoint} | ({"baseline": options.baseline} if options.baseline else {})
    # Before anything is computed.
    check_suite(suite, options.run_code)
    note = None
    if options.match:
        found = match(options.checkpoint, options.baseline, options.match)
        sides = {"model": str(found.folder), "baseline": str(found.other)}
        note = f"matched by {options.match}: {found}"
    texts = check_texts(suite, list(sides.values()))
    settings = Options(options.out, options.last, options.cache, options.device, options.threads, note, texts)
    for path in sides.values():
        checkpoints(path, options.last)
    with ranks.together() as rank:
        outcomes = [
            run_suite(suite, path, label, settings, console, baseline=label == "baseline")
            for label, path in sides.items()
        ]
        if rank:
            return
        latest = [series[-1] for series in outcomes]
        differences = (
            compare(latest[0].items, latest[1].items, latest[0].metrics, suite.level, suite.seed)
            if len(latest) > 1
            else []
        )
        page = write_page(suite, outcomes, differences, options.out, note)
    for metric in latest[0].metrics:
        if not metric.group or not any(o.task == metric.task and not o.group for o in latest[0].metrics):
            print(f"{metric.task:24}{metric.metric:24}{metric.group:16}{metric.value:10.4f}  ({metric.n:,} items)")
    if differences:
        whole = overall(differences)
        resolved = sum(one.verdict != "not resolved" for one in whole)
        print(f"{resolved} of {len(whole)} differences resolved at {suite.level:.0%}")
    for warning in dict.fromkeys(text for series in outcomes for one in series for text in one.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    print(page)
    failed = {f"{one.label}, {task}": why for series in outcomes for one in series for task, why in one.failed.items()}
    if failed:
        what = "1 task was" if len(failed) == 1 else f"{len(failed)} tasks were"
        raise UserError(
            f"{what} not measured; what is said of the others stands:\n  "
            + "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        )
