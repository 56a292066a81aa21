"""`python -m eval ruler`: what a model finds again in a long context."""

import argparse
from pathlib import Path

from eval.commands.options import count, names
from eval.commands.pair import add_pair, pair_of

HELP = "what a model finds again in a long context: RULER's 13 tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument(
        "--profile", choices=("tiny", "full"), default="tiny", help="short wording, or NVIDIA's (default tiny)"
    )
    parser.add_argument("--tasks", type=names, default=(), metavar="A,B", help="tasks or groups; default: all 13")
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N", help="tokens; default: powers of two from 128 to the context"
    )
    parser.add_argument(
        "--samples", type=count, default=50, metavar="N", help="of each task and length (default 50; NVIDIA: 500)"
    )
    parser.add_argument("--forced-only", action="store_true", help="generate nothing: teacher-forced metrics alone")
    parser.add_argument(
        "--threshold", type=float, default=0.856, metavar="P", help="of the effective length (default 0.856)"
    )
    parser.add_argument("--essay", type=Path, metavar="FILE", help="a text that hides needles; default: made-up prose")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's dev-v2.0.json, for qa_1")
    parser.add_argument("--hotpot", type=Path, metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")


def run(options: argparse.Namespace) -> None:
    checkpoints, note = pair_of(options)
    from rich.console import Console

    from eval.ruler.study import Wanted, study

    wanted = Wanted(
        profile=options.profile,
        tasks=options.tasks,
        lengths=options.lengths,
        samples=options.samples,
        seed=options.seed,
        generate=not options.forced_only,
        threshold=options.threshold,
        level=options.level,
        essay=options.essay,
        squad=options.squad,
        hotpot=options.hotpot,
    )
    lines = study(checkpoints, wanted, options.out, options.device, options.threads, Console(stderr=True), note)
    print("\n".join(([note] if note else []) + lines))


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({count(part.strip()) for part in text.split(",")}))
