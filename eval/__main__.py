"""`python -m eval TASK ...`: judge trained models and look inside them. `python -m eval SUITE.yaml ...` runs many.

Exit status: 0 done, 2 wrong input (one message), 130 interrupted.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

# torch is imported by the task that needs it: --help answers at once.
from engram.config import UserError
from eval.commands import (
    add_data,
    cka,
    depth,
    facts,
    gates,
    generate,
    logit_lens,
    long_ppl,
    match,
    ngram,
    perplexity,
    report,
    ruler,
    sensitivity,
    suite,
    verify_data,
)

TASKS = {
    "report": report,
    "suite": suite,
    "perplexity": perplexity,
    "generate": generate,
    "facts": facts,
    "gates": gates,
    "sensitivity": sensitivity,
    "logit_lens": logit_lens,
    "depth": depth,
    "cka": cka,
    "ruler": ruler,
    "long_ppl": long_ppl,
    "match": match,
    "ngram": ngram,
    "verify-data": verify_data,
    "add-data": add_data,
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].endswith((".yaml", ".yml")):
        # `python -m eval configs/eval/tiny.yaml --checkpoint DIR ...`
        given.insert(0, "suite")
    parser = _parser()
    if given and not given[0].startswith("-") and given[0] not in TASKS:
        near = difflib.get_close_matches(given[0], TASKS, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        parser.error(f"there is no task {given[0]!r}{hint} (tasks are {', '.join(TASKS)})")
    options = parser.parse_args(given)
    try:
        options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has closed it, like `head`; the flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Judge trained models and look inside them.")
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
    for name, command in TASKS.items():
        task = tasks.add_parser(name, help=command.HELP)
        command.add_arguments(task)
        task.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
