"""`python -m eval facts`: what models know of an invented world, and what they can read."""

import argparse
from pathlib import Path

from engram.config import UserError, WorldConfig
from eval.commands.options import add_machine, level, names, seed
from eval.output import check_out

HELP = "recall of invented facts by exposures, and reading, with known chance; --certify checks the questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs = "checkpoints or run folders; those that differ in their seeds are one recipe"
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="DIR", help=runs)
    parser.add_argument("--baseline", nargs="+", default=[], metavar="DIR", help="runs of one recipe to compare with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of tables, figures and page")
    parser.add_argument(
        "--certify", action="store_true", help="ask oracles instead: what n-grams, copies, guesses solve"
    )
    parser.add_argument("--config", metavar="FILE", help="whose world to certify; default: the default world")
    parser.add_argument("--sets", type=names, metavar="A,B", help="sets of questions; default: all")
    parser.add_argument("--level", type=level, default=0.95, metavar="P", help="of the intervals (default 0.95)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    from eval.facts.questions import SETS

    for name in options.sets or ():
        if name not in SETS:
            raise UserError(f"there is no set {name!r} (sets: {', '.join(SETS)})")
    sets = options.sets or SETS
    if options.certify:
        if options.checkpoint or options.baseline or options.out:
            raise UserError("--certify asks no model: leave --checkpoint, --baseline and --out away")
        _certify(options, sets)
        return
    if not options.checkpoint or options.out is None:
        raise UserError("facts are asked of models: give --checkpoint and --out, or --certify to check the questions")
    check_out(options.out)
    from rich.console import Console

    from eval.facts.study import Settings, study

    settings = Settings(sets, options.level, options.seed)
    console = Console(stderr=True)
    lines = study(options.checkpoint, options.baseline, settings, options.out, options.device, options.threads, console)
    print("\n".join(lines))


def _certify(options: argparse.Namespace, sets: tuple[str, ...]) -> None:
    """Print what oracles answer. Raises UserError where a set means something else than it says."""
    from engram.config import load_config
    from engram.data.world import build_world, documents
    from eval.facts.oracles import certify, overlap
    from eval.facts.questions import ask
    from eval.facts.score import world_of

    world = world_of(load_config(options.config)) if options.config else build_world(WorldConfig())
    certificates = certify(world, sets)
    for one in certificates:
        wanted = "solves it" if one.solves else f"at chance, {one.chance:.3f}"
        print(
            f"{one.oracle:14}{one.task:15}{one.accuracy:.3f} ({one.low:.3f} to {one.high:.3f})  "
            f"expected: {wanted}{'' if one.holds else '  FAILS'}"
        )
    shared = overlap(ask(world, sets), documents(world))
    print(f"prompts that share eight words in a row with the training text: {len(shared)}")
    broken = [f"{one.oracle} on {one.task}" for one in certificates if not one.holds]
    if broken or shared:
        found = "; ".join([*broken, *(shared[:1])])
        raise UserError(f"these questions leak or are broken: {found}: choose another world (data.sources.0.world)")
