"""The test harness itself: poison and seeds."""

import hashlib
import os
import random
from typing import Any

import numpy as np
import pytest
import torch


def run_as(module: str, expression: str) -> Any:
    """Evaluate an expression as if it stood in `module`."""
    return eval(expression, {"torch": torch, "__name__": module})


def test_uninitialised_memory_of_our_packages_is_poisoned() -> None:
    for expression in ("torch.empty(3, 2)", "torch.empty_like(torch.ones(3, 2))", "torch.ones(1).new_empty(3, 2)"):
        assert run_as("engram.memory.table", expression).isnan().all(), expression
        assert run_as("eval.facts", expression).isnan().all(), expression
    assert run_as("engram.x", "torch.empty(4, dtype=torch.bfloat16, requires_grad=True)").isnan().all()
    assert run_as("engram.x", "torch.empty(4, dtype=torch.int64)").tolist() == [2**63 - 1] * 4


def test_other_packages_and_meta_tensors_are_left_alone() -> None:
    for stranger in ("engrams.x", "torch.nn.modules.linear", "tests.engram"):
        assert run_as(stranger, "torch.empty(5, dtype=torch.int64)").tolist() != [2**63 - 1] * 5
    with torch.device("meta"):
        assert run_as("engram.x", "torch.empty(2**40)").is_meta


def test_seeds_come_from_the_name_of_the_test(request: pytest.FixtureRequest) -> None:
    drawn = random.random(), float(np.random.random()), float(torch.rand(()))
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    expected = random.random(), np.random.RandomState(seed).random_sample(), float(torch.rand((), generator=generator))
    assert drawn == expected


def test_workers_use_one_thread() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert torch.get_num_threads() == 1
