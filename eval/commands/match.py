"""`python -m eval match`: the checkpoint of a run that is nearest to another run's end, by loss or by compute."""

import argparse

HELP = "the checkpoint of a run that has another run's loss or compute"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="the run folder whose checkpoint is wanted")
    parser.add_argument("--baseline", required=True, metavar="RUN", help="the run folder whose end is matched")
    parser.add_argument("--by", choices=("loss", "flops"), default="loss", help="(default loss)")


def run(options: argparse.Namespace) -> None:
    from eval.matching import match

    print(match(options.checkpoint, options.baseline, options.by))
