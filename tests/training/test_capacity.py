"""Runs that do not fit into memory, and which errors mean that there is none left."""

from typing import Any

import numpy as np
import pytest
import torch

from engram.config import UserError
from engram.distributed.accounting import held_by
from engram.distributed.plan import make_plan
from engram.training import capacity
from engram.training.capacity import (
    check_memory,
    explain_out_of_memory,
    least_step_bytes,
)
from tests.distributed.plans import tiny

CPU = torch.device("cpu")


def exhaust_torch() -> None:
    torch.zeros(2**50, dtype=torch.uint8)


def exhaust_numpy() -> None:
    np.zeros(2**60, dtype=np.uint8)


def exhaust_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def exhaust_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("exhaust", [exhaust_torch, exhaust_numpy, exhaust_cuda, exhaust_cublas])
def test_every_way_to_run_out_is_known(exhaust) -> None:
    with pytest.raises(UserError, match="^buy more$"), explain_out_of_memory("buy more"):
        exhaust()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, explain_out_of_memory("buy more"):
        raise error
    assert raised.value is error


# ---------------------------------------------------------------------------------------------------------------- plans


def test_what_ranks_of_one_machine_hold_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tiny(distributed={"zero_stage": 0}), 2)
    held = sum(each.parameters + each.gradients + each.state for each in held_by(plan, 0))
    step = least_step_bytes(plan)
    free = 2 * (held + step)
    monkeypatch.setattr(capacity, "free_memory", lambda _: free)
    assert check_memory(plan, 0, range(2), CPU).startswith("the 2 ranks of this machine need 0.0 GiB for weights")
    free -= 1
    with pytest.raises(UserError, match=r"for a training step, but only .* lower train.micro_batch_size"):
        check_memory(plan, 0, range(2), CPU)
    free = 2 * held - 1
    with pytest.raises(UserError, match=r"the 2 ranks of this machine need .* only .* are free on cpu: lower model"):
        check_memory(plan, 0, range(2), CPU)


@pytest.mark.parametrize("storage", [None, {"tier": "host", "cache_rows": 500}])
def test_ranks_that_hold_no_rows_count_for_what_they_hold(
    monkeypatch: pytest.MonkeyPatch, storage: dict[str, Any] | None
) -> None:
    plan = make_plan(tiny(distributed={"table_ranks": 1}, train={"tables": storage}), 4)
    step = least_step_bytes(plan)
    held = [
        step + sum(each.parameters + each.gradients + each.state + each.host for each in held_by(plan, rank))
        for rank in range(4)
    ]
    assert held[0] > held[1] == held[2]
    for here in ([0, 1], [2, 3]):
        monkeypatch.setattr(capacity, "free_memory", lambda _, here=here: sum(held[rank] for rank in here))
        for rank in here:
            check_memory(plan, rank, here, CPU)
        monkeypatch.setattr(capacity, "free_memory", lambda _, here=here: sum(held[rank] for rank in here) - 1)
        for rank in here:
            with pytest.raises(UserError, match="the 2 ranks of this machine need"):
                check_memory(plan, rank, here, CPU)


def test_rows_in_host_memory_count_and_rows_in_files_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {
        tier: make_plan(tiny(distributed=None, train={"tables": {"tier": tier, "cache_rows": 500}}), 1)
        for tier in ("host", "file")
    }
    held = {tier: held_by(plan, 0) for tier, plan in plans.items()}
    device = sum(each.parameters + each.gradients + each.state for each in held["file"])
    moving, stored = (sum(each.host for each in held[tier]) for tier in ("file", "host"))
    assert stored - moving == sum(each.file for each in held["file"]) > 0
    monkeypatch.setattr(capacity, "free_memory", lambda _: device + moving + least_step_bytes(plans["file"]))
    check_memory(plans["file"], 0, range(1), CPU)
    with pytest.raises(UserError, match="the run needs"):
        check_memory(plans["host"], 0, range(1), CPU)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_needs_room_for_the_whole_backbone_at_the_start(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    plan = make_plan(tiny(distributed={"zero_stage": stage}), 2)
    start = sum(4 * group.elements for group in plan.groups) + sum(12 * table.num_rows for table in plan.tables)
    monkeypatch.setattr(capacity, "free_memory", lambda device: 2 * start if device.type == "cpu" else 2**40)
    cuda = torch.device("cuda")
    check_memory(plan, 0, range(2), cuda)
    monkeypatch.setattr(capacity, "free_memory", lambda device: 2 * start - 1 if device.type == "cpu" else 2**40)
    with pytest.raises(UserError, match="each of them has the whole in host memory.* for the 2 of this"):
        check_memory(plan, 0, range(2), cuda)
    check_memory(plan, 0, range(1), cuda)
