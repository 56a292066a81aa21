"""`python -m eval sensitivity`: what tasks and the loss lose when the memory is switched off or changed."""

import argparse
from pathlib import Path

from eval.commands.options import add_machine, count, level, names, seed
from eval.output import check_out

HELP = "what tasks and the loss lose when the memory is switched off or changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="DIR",
        help="checkpoints or run folders of one model, which differ in their seeds",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of tables, figures and page")
    parser.add_argument(
        "--modes",
        type=names,
        default=("zero_embedding", "mean", "shuffled"),
        metavar="A,B",
        help="zero_embedding, zero_output, gate_one, mean, shuffled (default zero_embedding,mean,shuffled)",
    )
    parser.add_argument("--per", choices=("layer", "order", "head"), help="change one part of the memory at a time")
    parser.add_argument("--tasks", type=names, default=("loss",), metavar="A,B", help="loss, facts (default loss)")
    parser.add_argument(
        "--suite",
        metavar="FILE",
        help="tasks of this suite too (configs/eval/packages.yaml, say), but for losses: how much of scores is kept",
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the model was trained on")
    parser.add_argument(
        "--tokens", type=count, default=50_000, metavar="N", help="validation tokens for the loss (default 50000)"
    )
    parser.add_argument(
        "--reference-tokens",
        type=count,
        default=50_000,
        metavar="N",
        help="tokens of the train split that mean and shuffled take their rows from (default 50000)",
    )
    parser.add_argument("--level", type=level, default=0.9, metavar="P", help="of the intervals (default 0.9)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.sensitivity.study import Settings, study
    from eval.sensitivity.tasks import check_tasks

    check_tasks(options.tasks)
    check_out(options.out)
    settings = Settings(
        tasks=options.tasks,
        suite=options.suite,
        modes=options.modes,
        per=options.per,
        data=options.data,
        tokens=options.tokens,
        reference_tokens=options.reference_tokens,
        level=options.level,
        seed=options.seed,
    )
    lines = study(options.checkpoint, settings, options.out, options.device, options.threads, Console(stderr=True))
    print("\n".join(lines))
