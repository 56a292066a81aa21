"""`python -m eval long_ppl`: perplexity of the tokens that need a long context."""

import argparse
from pathlib import Path

from eval.commands.options import count
from eval.commands.pair import add_pair, pair_of

HELP = "perplexity of the tokens that need a long context (LongPPL)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument(
        "--evaluator", required=True, metavar="DIR", help="the checkpoint that says which tokens need a long context"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the checkpoint was trained on")
    parser.add_argument(
        "--tokens", type=count, default=100_000, metavar="N", help="validation tokens to read (default 100000)"
    )
    parser.add_argument(
        "--context", type=count, metavar="L", help="documents are cut to it; default: the shortest model's"
    )
    parser.add_argument("--window", type=count, metavar="K", help="tokens of the short context; default: L / 8")
    parser.add_argument("--stride", type=count, metavar="D", help="tokens scored from one window; default: L / 32")
    parser.add_argument("--alpha", type=float, default=2.0, metavar="X", help="nats that the rest must add (default 2)")
    parser.add_argument(
        "--beta", type=float, default=-2.0, metavar="X", help="log-probability that must be passed (default -2)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of the evaluator's losses; default: OUT/cache")


def run(options: argparse.Namespace) -> None:
    checkpoints, note = pair_of(options)
    from rich.console import Console

    from eval.long_ppl.study import Wanted, study

    wanted = Wanted(
        evaluator=options.evaluator,
        data=options.data,
        tokens=options.tokens,
        context=options.context,
        window=options.window,
        stride=options.stride,
        alpha=options.alpha,
        beta=options.beta,
        cache=options.cache or options.out / "cache",
        level=options.level,
        seed=options.seed,
    )
    lines = study(checkpoints, wanted, options.out, options.device, options.threads, Console(stderr=True), note)
    print("\n".join(([note] if note else []) + lines))
