"""A contest: several ways to do the same work, checked against one reference and then measured in turns."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.targets import Target
from engram.kernels.choose import watched_choices

# Uncounted first rounds: they compile, allocate and fill caches.
WARMUP = 2
# Even a contest that is out of time takes the median of three.
FEWEST_REPEATS = 3
# Among those that fail.
REFERENCE = "reference"

Step = Callable[[], Sequence[Tensor]]
Timer = Callable[[Step], float]


def nothing() -> None:
    """The preparation of a step that needs none."""


@dataclass(frozen=True)
class Run:
    """A contender that is ready: `prepare` runs before every step and is not timed. A step returns what is checked."""

    step: Step
    prepare: Callable[[], object] = nothing


@dataclass(frozen=True)
class Contender:
    """`build` may raise: what cannot be imported or run is reported with its reason.

    `tolerance` bounds |result - reference| / (|reference| + rms(reference)) of every element; None: there is nothing to
    compare. `ideal_bytes` is what has to be moved at least, for shares of the copy bandwidth.
    """

    name: str
    build: Callable[[], Run]
    tolerance: float | None
    ideal_bytes: int | None = None


@dataclass(frozen=True)
class Contest:
    op: str
    title: str
    reference: Step
    contenders: Sequence[Contender]
    targets: Sequence[Target] = ()


class WrongResult(AssertionError):
    """A contender that does other work than the reference."""


@dataclass(frozen=True)
class Checked:
    """By contender: the largest error of its first step, why it failed or is wrong, what each of our operations ran."""

    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    implementations: dict[str, dict[str, str]] = field(default_factory=dict)


def check(contest: Contest) -> Checked:
    """The first step of each contender."""
    checked = Checked()
    failed = checked.failed
    with reported(failed, REFERENCE):
        expected = contest.reference()
    if failed:
        # What cannot be checked is not timed.
        failed.update({contender.name: "the reference failed" for contender in contest.contenders})
        return checked
    for contender in contest.contenders:
        with reported(failed, contender.name):
            _check_first_step(contender, expected, checked)
    return checked


def _check_first_step(contender: Contender, expected: Sequence[Tensor], checked: Checked) -> None:
    run = contender.build()
    run.prepare()
    results = run.step()
    if contender.tolerance is not None:
        _compare(contender, results, expected, checked)

    def again() -> None:
        run.prepare()
        run.step()

    if implementations := implementations_of(again):
        checked.implementations[contender.name] = implementations


def implementations_of(step: Callable[[], object]) -> dict[str, str]:
    """Which implementation runs for each of our operations in a step, which is taken: none for peers."""
    # Compiled code chooses when it is traced, perhaps in the step of another contender.
    with torch.compiler.set_stance("force_eager"), watched_choices() as choices:
        step()
    return choices


def _compare(contender: Contender, results: Sequence[Tensor], expected: Sequence[Tensor], checked: Checked) -> None:
    assert contender.tolerance is not None
    if len(results) != len(expected):
        raise WrongResult(f"{len(results)} results, expected {len(expected)}")
    error = checked.errors[contender.name] = max(map(largest_error, results, expected))
    if not error <= contender.tolerance:
        raise WrongResult(f"off by {error:.3g}, allowed {contender.tolerance:g}")


def largest_error(result: Tensor, expected: Tensor) -> float:
    """Largest |result - expected| / (|expected| + rms(expected)); infinite for another shape and for NaN."""
    if result.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(result, expected) else math.inf
    expected = expected.detach().float()
    error = (result.detach().float() - expected).abs_()
    scale = expected.abs().add_(expected.square().mean().sqrt())
    # 0 / 0 is no error.
    relative = torch.where(error == 0, 0.0, error.div_(scale))
    return float(torch.nan_to_num(relative, nan=math.inf).max())


def measure(
    contest: Contest, failed: dict[str, str], timer: Timer, *, repeats: int, limit: float
) -> dict[str, list[float]]:
    """Seconds of every step; all contenders take their n-th step before any takes the next one.

    Those in `failed` are left out, and those that fail now are added to it. After `limit` seconds it stops early.
    """
    runs: dict[str, Run] = {}
    for contender in contest.contenders:
        if contender.name not in failed:
            with reported(failed, contender.name):
                runs[contender.name] = contender.build()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = math.inf
    for index in range(WARMUP + repeats):
        if index == WARMUP:
            start = time.perf_counter()
        if index >= WARMUP + FEWEST_REPEATS and time.perf_counter() - start > limit:
            break
        # Each round starts with another one: what a step leaves in the caches is not always the same one's advantage.
        order = [name for name in runs if name not in failed]
        for name in order[index % len(order) :] + order[: index % len(order)] if order else ():
            with reported(failed, name):
                runs[name].prepare()
                elapsed = timer(runs[name].step)
                if index >= WARMUP:
                    seconds[name].append(elapsed)
    return {name: times for name, times in seconds.items() if name not in failed}


@contextlib.contextmanager
def reported(failed: dict[str, str], name: str) -> Iterator[None]:
    """What fails is named with its reason, and the others go on."""
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [""]
        failed[name] = f"{type(error).__name__}: {lines[0][:160]}"


def cpu_timer(step: Step) -> float:
    start = time.perf_counter()
    # Held until the clock is read: freeing a result is no part of the step.
    result = step()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


class CudaTimer:
    """Seconds between two events around a step that finds none of its data in the L2 cache."""

    def __init__(self) -> None:
        # Much larger than any L2: while the device fills it, the host queues the step, and its launches cost nothing.
        self.filler = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.filler.zero_()
        start.record()
        result = step()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3
