"""`python -m eval logit_lens`: how close each depth's prediction is to the final one."""

import argparse

from eval.commands.options import count
from eval.commands.sides import add_sides, sides_of

HELP = "how close each depth's prediction is to the final one, with intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument(
        "--direction",
        choices=("layer_to_final", "final_to_layer"),
        default="layer_to_final",
        help="KL(p_l || p_L), the default, or KL(p_L || p_l): plotted and made into numbers; tables hold both",
    )
    parser.add_argument("--tau", type=positive, default=1.0, metavar="NATS", help="threshold of depth (default 1)")
    parser.add_argument("--streams", action="store_true", help="read each residual stream alone too")
    parser.add_argument(
        "--tuned", type=count, default=0, metavar="STEPS", help="train a tuned lens too, for so many steps (try 300)"
    )


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.lens.study import study
    from eval.lens.tables import Settings

    settings = Settings(
        direction=options.direction,
        tau=options.tau,
        streams=options.streams,
        tuned_steps=options.tuned,
        data=options.data,
        tokens=options.tokens,
        level=options.level,
        seed=options.seed,
    )
    print(
        "\n".join(
            study(sides_of(options), settings, options.out, options.device, options.threads, Console(stderr=True))
        )
    )


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number
