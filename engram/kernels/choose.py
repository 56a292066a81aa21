"""Which implementation of an operation runs: the one place that decides, and that says why one does not."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "triton", "native"]
Obstacle = Callable[[], str | None]

# Channels that kernels handle at a time: those of operations that name a limit.
WIDTH_STEP = 16


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here; the message says why."""


class MachineObstacle(str):
    """A reason that lies in the machine, not in an operation or its tensors: it stops all kernels of a kind."""


# One for each `watched_choices` that is open.
_watchers: list[dict[str, str]] = []


@contextlib.contextmanager
def watched_choices() -> Iterator[dict[str, str]]:
    """What runs inside: the implementation of each operation that is called or traced, by its name."""
    choices: dict[str, str] = {}
    _watchers.append(choices)
    try:
        yield choices
    finally:
        _watchers.pop()


def choose(op: str, impl: str, device: str, *, fallback: str = "reference", **obstacles: Obstacle) -> str:
    """`impl` itself; for "auto" triton on CUDA and native on CPU, or `fallback` where that one has an obstacle.

    `obstacles` holds each implementation besides reference: a function that gives None where it can run on the tensors
    at hand, else the reason, which "auto" logs once: for each operation, or for all where it is a MachineObstacle.
    Raises ValueError for a name that the operation does not have, ImplementationUnavailable for one that cannot run.
    """
    chosen = _choose(op, impl, device, fallback, obstacles)
    for choices in _watchers:
        choices[op] = chosen
    return chosen


def _choose(op: str, impl: str, device: str, fallback: str, obstacles: dict[str, Obstacle]) -> str:
    if impl == "auto":
        fast = "triton" if device == "cuda" else "native"
        if fast not in obstacles:
            return fallback
        reason = obstacles[fast]()
        if reason is None:
            return fast
        who, kernel = f"{op} runs", f"its {fast} kernel cannot run"
        if isinstance(reason, MachineObstacle):
            who, kernel = "everything runs", f"no {fast} kernel can run here"
        _warn_once(f"{who} on torch's own operations, which is slower, because {kernel}: {reason}")
        return fallback
    if impl == "reference":
        return impl
    if impl not in obstacles:
        raise ValueError(f"{op} has no implementation {impl!r}: choose one of auto, reference, {', '.join(obstacles)}")
    if reason := obstacles[impl]():
        raise ImplementationUnavailable(f"{op}: the {impl} implementation was asked for, but {reason}")
    return impl


def check_devices(op: str, **operands: Tensor | None) -> None:
    """Raises ValueError for operands on different devices: kernels take addresses, which mean nothing elsewhere."""
    devices = {name: operand.device for name, operand in operands.items() if operand is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op} needs its operands on one device: {where}")


def check_integers(op: str, **values: object) -> None:
    """Raises TypeError for a number that is no integer, which the dispatcher would refuse without naming it."""
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{op} needs an integer for {name}, not {value!r}")


def width_obstacle(what: str, width: int, *, most: int | None = None) -> str | None:
    """What keeps kernels that handle WIDTH_STEP channels at a time from taking `what` this wide; None if nothing."""
    if width and width % WIDTH_STEP == 0 and (most is None or width <= most):
        return None
    limit = "" if most is None else f" up to {most}"
    return f"{what} are {width} wide, and it takes widths that are multiples of {WIDTH_STEP}{limit}"


def is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(device: str) -> str | None:
    """What keeps Triton kernels from running on tensors of this device type; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return MachineObstacle("triton is not installed (it comes with `pip install triton`, on Linux)")
    if device == "cuda" or is_interpreted():
        return None
    return (
        f"the tensors are on {device}: triton kernels run on CUDA devices, or on CPU in triton's interpreter if "
        "TRITON_INTERPRET=1 is set before the program starts"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
