"""Speed of every kernel beside other people's, in one process and in turns, with the targets that they were built for.

    python -m benchmarks.kernels [--device cuda] [--only hash gather] [--repeats 20] [--threads 2]

First everybody's result is checked against the reference, on the shapes that are timed; who is wrong is not timed. Then
all take their n-th step before any takes the next. Medians and ratios are what to read: absolute times follow the
machine's mood. On CUDA, times are those of the device, with a cold L2 cache. Ideal GB/s count what has to be moved at
least, once. Exit status 1: a result was wrong.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contest import Contest, CudaTimer, Timer, WrongResult, check, cpu_timer, measure
from benchmarks.kernel_inputs import CPU, CUDA, Sizes
from benchmarks.kernel_report import Outcome, print_outcome, print_verdicts
from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from benchmarks.memory_contests import gathers, hashes, lookups, table_updates
from benchmarks.model_contests import attentions, blocks, experts, head_losses
from benchmarks.module_contests import connections, gates_and_convs, modules
from engram.config import TrainConfig
from engram.training.setup import configure_process

CONTESTS: dict[str, Callable[[Sizes, str], Iterator[Contest]]] = {
    "hash": hashes,
    "gather": gathers,
    "lookup": lookups,
    "table_update": table_updates,
    "gate_conv": gates_and_convs,
    "engram": modules,
    "mhc": connections,
    "experts": experts,
    "head_loss": head_losses,
    "attention": attentions,
    "block": blocks,
}


def run_contests(
    names: Sequence[str], sizes: Sizes, device: str, timer: Timer, *, repeats: int, limit: float, console: Console
) -> list[Outcome]:
    """All checks, then all measurements. Inputs are made anew for each: only one contest at a time has to fit."""
    checks = {}
    with console.status("checking") as status:
        for contest in each_contest(names, sizes, device):
            status.update(f"checking {contest.title}")
            checks[contest.title] = check(contest)
    outcomes = []
    with console.status("measuring") as status:
        for contest in each_contest(names, sizes, device):
            status.update(f"measuring {contest.title}")
            checked = checks[contest.title]
            seconds = measure(contest, checked.failed, timer, repeats=repeats, limit=limit)
            outcomes.append(Outcome.of(contest, seconds, checked))
            print_outcome(outcomes[-1], console)
    return outcomes


def each_contest(names: Sequence[str], sizes: Sizes, device: str) -> Iterator[Contest]:
    for name in names:
        contests = CONTESTS[name](sizes, device)
        while True:
            # Nobody's compiled code is specialised or given up because of what an earlier contest compiled.
            torch.compiler.reset()
            try:
                contest = next(contests)
            except StopIteration:
                break
            except Exception as error:
                contest = without_inputs(name, error)
            yield contest
            del contest
            gc.collect()
            torch.cuda.empty_cache()


def without_inputs(name: str, error: Exception) -> Contest:
    """In place of a contest whose inputs could not be made: says so, and lets the others go on."""
    message = f"its inputs could not be made: {type(error).__name__}: {error}"

    def reference() -> Sequence[Tensor]:
        raise RuntimeError(message)

    return Contest(name, name, reference, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTS), metavar="OP", help=f"of {', '.join(CONTESTS)}")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="counted steps of each contender (default: 20)")
    parser.add_argument(
        "--seconds", type=at_least(1), default=20, help="after which a contest ends early (default: 20)"
    )
    parser.add_argument("--threads", type=at_least(1), default=None, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")

    configure_process(TrainConfig(steps=1, batch_size=1, threads=arguments.threads))
    console = Console()
    if not console.is_terminal:
        # Written to a file, which is wider than rich believes.
        console = Console(width=140)
    on_cuda = arguments.device == "cuda"
    # On CPU, benchmarks.training measures whole steps with and without memory.
    names = list(dict.fromkeys(arguments.only or ())) or [name for name in CONTESTS if on_cuda or name != "block"]
    outcomes = run_contests(
        names,
        CUDA if on_cuda else CPU,
        arguments.device,
        CudaTimer() if on_cuda else cpu_timer,
        repeats=arguments.repeats,
        limit=arguments.seconds,
        console=console,
    )
    if arguments.repeats < FEWEST_REPEATS:
        console.print(f"a trial of fewer than {FEWEST_REPEATS} repeats: no verdict, and nothing is saved")
    else:
        print_verdicts(outcomes, console)
        rows = [row for outcome in outcomes for row in outcome.rows()]
        part = "-".join(["kernels", *(names if arguments.only else ())])
        console.print(f"saved {save_results(rows, describe_machine(arguments.device), part)}", soft_wrap=True)
    reasons = [reason for outcome in outcomes for reason in outcome.failed.values()]
    sys.exit(any(reason.startswith(WrongResult.__name__) for reason in reasons))


if __name__ == "__main__":
    main()
