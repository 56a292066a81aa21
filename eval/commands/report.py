"""`python -m eval report`: one HTML page about training runs, or with every study of one or two models."""

import argparse
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_device, count, level, seed
from eval.commands.sides import sides_of

HELP = "one HTML page: about training runs (RUN_DIR ...), or every study of two models (--checkpoint ...)"
_DESCRIPTION = """\
RUN_DIR ...: how runs were trained, and their losses, samples and gates. Writes RUN_DIR/report.html, or --out FILE.html.

--checkpoint A [--baseline B] --out DIR: every study that these models allow, on one page, DIR/index.html: perplexity,
logit_lens, cka, depth, gates, sensitivity and facts, each with its figures and tables in a folder of DIR. A study that
is finished there, from the same checkpoints, data and options, is not made again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("run_dirs", nargs="*", default=[], metavar="RUN_DIR", help="folder of a training run")
    subject.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="DIR", help="checkpoints or run folders that differ in seeds"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html|DIR", help="the page; with --checkpoint: a folder")
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the first model was trained on")
    add_device(parser)
    studies = parser.add_argument_group("with --checkpoint")
    studies.add_argument("--baseline", nargs="+", default=[], metavar="DIR", help="what to compare with, as above")
    studies.add_argument("--name", default="model", help="what to call the checkpoints (default model)")
    studies.add_argument("--baseline-name", default="baseline", metavar="NAME", help="(default baseline)")
    studies.add_argument(
        "--tokens", type=count, default=50_000, metavar="N", help="tokens that each study reads (default 50000)"
    )
    studies.add_argument("--level", type=level, default=0.9, metavar="P", help="of the intervals (default 0.9)")
    studies.add_argument("--seed", type=seed, default=0, metavar="N", help="of the bootstraps (default 0)")
    studies.add_argument("--threads", type=count, metavar="N", help="CPU threads; default: as many as in training")


def run(options: argparse.Namespace) -> None:
    if options.checkpoint:
        _studies(options)
    else:
        _runs(options)


def _runs(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.report import print_summary, write_report

    if options.baseline:
        raise UserError(
            "--baseline belongs to --checkpoint: to see runs side by side, name both as RUN_DIR; for every study of "
            "two models, give --checkpoint and --out"
        )
    path, runs = write_report(options.run_dirs, options.out, data=options.data, device=options.device)
    print_summary(runs, path, Console())


def _studies(options: argparse.Namespace) -> None:
    if options.out is None:
        raise UserError("the studies of --checkpoint are written into a folder: name it with --out DIR")
    if options.out.suffix.lower() in (".html", ".htm"):
        raise UserError(f"{options.out}: --checkpoint writes a folder with a page in it: name a folder with --out")
    sides = sides_of(options)
    from rich.console import Console

    from eval.studies.plan import Wanted
    from eval.studies.report import write_studies

    wanted = Wanted(options.data, options.tokens, options.level, options.seed, options.device, options.threads)
    print("\n".join(write_studies(sides, wanted, options.out, Console(stderr=True))))
