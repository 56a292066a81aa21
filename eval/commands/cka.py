"""`python -m eval cka`: which layer of a baseline each layer of a model is like."""

import argparse
from pathlib import Path

from engram.config import UserError
from eval.commands.options import count
from eval.commands.sides import add_sides, sides_of

HELP = "similarity of two models' layers (CKA), and which layer of a baseline each layer is like"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument(
        "--positions",
        choices=("entities", "all"),
        default="entities",
        help="the last token of each named entity (default), or every token of the first --tokens",
    )
    parser.add_argument(
        "--entities",
        type=Path,
        metavar="FILE",
        help="lines `word <tab> label` as Few-NERD has them; default: capitalised names in the validation documents",
    )
    parser.add_argument("--max-entities", type=count, metavar="N", help="entities at most; default: all that are found")
    parser.add_argument(
        "--distinct-last-token", action="store_true", help="take one entity only for each token that entities end with"
    )
    parser.add_argument(
        "--point",
        choices=("resid_post", "resid_mid", "resid_memory", "resid_pre", "attn_out", "ffn_out"),
        default="resid_post",
        help="where in each block (default resid_post, what it returns)",
    )
    parser.add_argument(
        "--stream",
        type=stream,
        default=None,
        metavar="merged|0|1..",
        help="residual streams as the model merges them in the end (default), or one of them",
    )
    parser.add_argument(
        "--unit-norm",
        action="store_true",
        help="divide each state by its norm, as what reads the streams does: a few huge states then decide nothing",
    )
    parser.add_argument("--batch", type=count, default=256, metavar="N", help="positions of a batch (default 256)")
    parser.add_argument("--top-k", type=count, default=5, metavar="K", help="layers of soft alignment (default 5)")
    parser.add_argument(
        "--null",
        choices=("baseline", "none"),
        default="baseline",
        help="what alignment is compared with: the baseline against itself and, where given, its next seed; none: "
        "allows unequal numbers of layers",
    )
    parser.add_argument("--exact", action="store_true", help="also CKA over all positions at once, without intervals")


def run(options: argparse.Namespace) -> None:
    if not options.baseline:
        raise UserError("layers are compared with those of another model: name it with --baseline")
    if options.entities and options.positions == "all":
        raise UserError("--entities names where entities are, but --positions is all: leave one of them away")
    from rich.console import Console

    from eval.cka.study import Settings, study

    settings = Settings(
        positions=options.positions,
        entities=options.entities,
        max_entities=options.max_entities,
        distinct_last_token=options.distinct_last_token,
        point=options.point,
        stream=options.stream,
        unit_norm=options.unit_norm,
        batch=options.batch,
        top_k=options.top_k,
        null=options.null,
        exact=options.exact,
        data=options.data,
        tokens=options.tokens,
        level=options.level,
        seed=options.seed,
    )
    sides = sides_of(options)
    print("\n".join(study(sides, settings, options.out, options.device, options.threads, Console(stderr=True))))


def stream(text: str) -> int | None:
    if text == "merged":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not merged, 0, 1, ...")
    return int(text)
