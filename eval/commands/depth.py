"""`python -m eval depth`: measures of effective depth side by side."""

import argparse

from eval.commands.logit_lens import positive
from eval.commands.sides import add_sides, sides_of

HELP = "measures of effective depth side by side: lens, alignment, skipped blocks, contributions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument("--tau", type=positive, default=1.0, metavar="NATS", help="threshold of the lens (default 1)")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.depth.study import study
    from eval.lens.tables import Settings

    settings = Settings(
        tau=options.tau, data=options.data, tokens=options.tokens, level=options.level, seed=options.seed
    )
    print(
        "\n".join(
            study(sides_of(options), settings, options.out, options.device, options.threads, Console(stderr=True))
        )
    )
