"""What every test gets: seeds from its own name, poisoned uninitialised memory, one thread per process."""

import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

OUR_PACKAGES = ("engram", "eval")

if not torch.cuda.is_available():
    # Read when a module with Triton kernels is imported: without a GPU they run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("engram", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.load_profile("engram")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two-thread torch beside busy workers runs many times slower than one thread.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whether it runs alone, in order, or on another worker."""
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets its own number of threads for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _poison() -> Iterator[None]:
    """Memory that our code leaves uninitialised holds NaN (integers: their largest value), never a lucky zero."""
    # Caches the original functions: `with torch.device("meta")` looks them up by identity at its first use.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta:
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] in OUR_PACKAGES and tensor.dtype != torch.bool:
            floating = tensor.is_floating_point() or tensor.is_complex()
            with torch.no_grad():
                tensor.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned
