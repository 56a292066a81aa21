"""Which implementation of an operation runs: the one place that decides, and that says why one does not."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal

from torch import Tensor

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "triton", "native"]
Obstacle = Callable[[], str | None]


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here; the message says why."""


def choose(op: str, impl: str, device: str, **obstacles: Obstacle) -> str:
    """`impl` itself; for "auto" triton on CUDA and native on CPU, or reference where that one has an obstacle.

    `obstacles` holds each implementation besides reference: a function that gives None where it can run on the tensors
    at hand, else the reason, which "auto" logs once. Raises ValueError for a name that the operation does not have,
    ImplementationUnavailable for one that cannot run.
    """
    if impl == "auto":
        fast = "triton" if device == "cuda" else "native"
        if fast not in obstacles:
            return "reference"
        reason = obstacles[fast]()
        if reason is None:
            return fast
        _warn_once(
            f"{op} runs on torch's own operations, which is slower, because its {fast} kernel cannot run: {reason}"
        )
        return "reference"
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


def is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(device: str) -> str | None:
    """What keeps Triton kernels from running on tensors of this device type; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with `pip install triton`, on Linux)"
    if device == "cuda" or is_interpreted():
        return None
    return (
        f"the tensors are on {device}: triton kernels run on CUDA devices, or on CPU in triton's interpreter if "
        "TRITON_INTERPRET=1 is set before the program starts"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
