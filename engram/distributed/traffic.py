"""Bytes that a rank of a plan sends in a step, and whether fetching rows hides behind computing.

Sends are those of ring collectives. DeepSpeed 0.19.8 sums gradients by all-reduce in all stages but the third.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from engram.config import ModelConfig
from engram.distributed.accounting import asked_at_most, compute_bytes, gradient_row
from engram.distributed.distinct_rows import rows_by_zipf
from engram.distributed.layout import ENTRY, FLOAT, INDEX, Table
from engram.distributed.machine import Machine
from engram.distributed.plan import Plan
from engram.model.accounting import count_flops


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends to others in a step, the mean over ranks."""

    name: str
    at_most: float
    # Where it depends on the text or the routing, an estimate; else the same.
    estimate: float


@dataclass(frozen=True)
class Window:
    """Seconds of computing behind which rows are fetched, and seconds that fetching them takes."""

    name: str
    compute: float
    at_most: float
    estimate: float

    @property
    def verdict(self) -> str:
        """Whether they are hidden behind each other."""
        if self.at_most <= self.compute:
            return "hidden"
        if self.estimate <= self.compute:
            return "hidden by the estimate"
        return f"{1000 * (self.estimate - self.compute):,.3g} ms not hidden"


def sent_by(plan: Plan) -> list[Sent]:
    """What a rank sends in a step, by what it is sent for."""
    found = [*_backbone_traffic(plan), *_expert_traffic(plan), *_table_traffic(plan)]
    return [each for each in found if each.at_most]


def _backbone_traffic(plan: Plan) -> Iterator[Sent]:
    stage, micro = plan.settings.zero_stage, plan.micro_batches
    # Each element once around the ring, but for the place where it starts.
    around = [FLOAT * group.whole * (group.holders - 1) / group.holders for group in plan.groups]
    # Stages 2 and 3 hold no gradient that is not divided, so they sum in every micro-batch.
    reductions = micro if stage >= 2 else 1
    yield _certain("gradients", sum(around) * reductions * (1 if stage == 3 else 2))
    if stage == 0:
        return
    # In stage 3: forward, backward, and once more where blocks run again.
    gathers = micro * (3 if plan.config.train.activation_checkpointing else 2) if stage == 3 else 1
    yield _certain("parameters", sum(around) * gathers)
    if muon := plan.config.optim.muon:
        # Directions to whoever orthogonalises them, and updates back; before stage 3 most matrices lie on one rank.
        shares = sum(one / group.holders for one, group in zip(around, plan.groups, strict=True) if group.moments == 1)
        yield _certain("Muon's directions", 2 * shares * ENTRY[muon.newton_schulz_dtype] / FLOAT)


def _expert_traffic(plan: Plan) -> Iterator[Sent]:
    model, ranks = plan.config.model, plan.settings.expert_ranks
    if model.moe is None or ranks == 1:
        return
    layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    row, weights = model.hidden_size * compute_bytes(plan), model.moe.top_k * FLOAT
    forward = row + weights + model.moe.top_k * INDEX + row
    backward = row + row + weights
    bytes_each = plan.tokens * layers * (forward * (2 if plan.config.train.activation_checkpointing else 1) + backward)
    most = min(model.moe.top_k, ranks - 1)
    yield Sent("tokens to experts", bytes_each * most, bytes_each * remote_ranks(plan))


def remote_ranks(plan: Plan) -> float:
    """Other ranks that a token is sent to, on average where all choices of experts are equally likely."""
    moe, ranks = plan.config.model.moe, plan.settings.expert_ranks
    assert moe is not None
    elsewhere = math.comb(moe.num_experts - moe.num_experts // ranks, moe.top_k)
    return (ranks - 1) * (1 - elsewhere / math.comb(moe.num_experts, moe.top_k))


def _table_traffic(plan: Plan) -> Iterator[Sent]:
    if plan.divides_tables:
        yield from exchanged(plan)
    elif plan.config.optim.table.kind == "dense_adam":
        dense = sum(table.num_rows * table.settings.head_dim * FLOAT for table in plan.tables)
        yield _certain("gradients of tables", 2 * dense * (plan.ranks - 1) / plan.ranks)
    else:
        at_most = sum(asked_at_most(table, plan) * gradient_row(table) for table in plan.tables)
        estimate = sum(_asked_estimate(table, plan) * gradient_row(table) for table in plan.tables)
        yield Sent("gradients of rows", at_most * (plan.ranks - 1), estimate * (plan.ranks - 1))


def exchanged(plan: Plan) -> list[Sent]:
    """Of divided tables: ids to owners and rows back, and after the backward pass gradients to owners."""
    at_most, estimate = [0.0] * 3, [0.0] * 3
    for table in plan.tables:
        asked = _asked_estimate(table, plan)
        for kind, size in enumerate((INDEX, table.row_bytes, table.settings.head_dim * FLOAT)):
            # All rows may be others', but on average an N-th of what all ranks ask for lies where it is asked for.
            at_most[kind] += asked_at_most(table, plan) * size * (plan.ranks > 1)
            estimate[kind] += asked * size * (plan.ranks - 1) / plan.ranks
    return [Sent(*each) for each in zip(("ids of rows", "rows", "gradients of rows"), at_most, estimate, strict=True)]


def _asked_estimate(table: Table, plan: Plan) -> float:
    return rows_by_zipf(table, range(table.num_rows), plan.config.model.vocab_size, plan.tokens)


def windows(plan: Plan, machine: Machine) -> list[Window]:
    """What of tables travels or is stored, and how long a device at full speed computes meanwhile."""
    memory, found = plan.config.model.memory, []
    if plan.divides_tables and plan.ranks > 1 and memory:
        # The rows of a whole step travel while the first micro-batch runs through the blocks before the first memory.
        first = memory.layer_ids[0]
        flops = flops_before(plan.config.model, first, plan.config.data.sequence_length)
        before = flops * plan.tokens / plan.micro_batches / (machine.device_tflops * 1e12)
        # Owners send and receive what all ranks ask for.
        busiest = plan.ranks / sum(len(rows) > 0 for rows in plan.tables[0].ranges)
        for each in exchanged(plan):
            name, compute = (f"rows, until block {first}", before) if each.name == "rows" else (each.name, 0.0)
            at_most, estimate = (_seconds(busiest * size, machine.link_gbps) for size in (each.at_most, each.estimate))
            found.append(Window(name, compute, at_most, estimate))
    if plan.config.train.tables is not None:
        found.append(_storage_window(plan, machine))
    return found


def _storage_window(plan: Plan, machine: Machine) -> Window:
    """The next step's rows and state come, and as many go, while a step computes: as if none were in the cache."""
    storage, config = plan.config.train.tables, plan.config
    assert storage is not None
    flops = count_flops(config.model, config.data.sequence_length)
    again = flops.forward if config.train.activation_checkpointing else 0
    speed = machine.host_gbps if storage.tier == "host" else machine.file_gbps
    at_most = estimate = 0.0
    for table in plan.tables:
        size = 2 * plan.stored_row(table)
        at_most += plan.rows_at_most(table, 0) * size
        tokens, vocabulary = plan.tokens_for_owner, config.model.vocab_size
        estimate += rows_by_zipf(table, table.ranges[0], vocabulary, tokens) * size
    where = "host memory" if storage.tier == "host" else "a file"
    return Window(
        f"rows from and to {where}, in a step",
        (flops.training + again) * plan.tokens / (machine.device_tflops * 1e12),
        _seconds(at_most, speed),
        _seconds(estimate, speed),
    )


def flops_before(model: ModelConfig, layer: int, sequence_length: int) -> int:
    """FLOPs of one token in the blocks before `layer`, forward."""
    if layer == 0:
        return 0
    moe = model.moe and model.moe.replace(num_dense_layers=min(model.moe.num_dense_layers, layer))
    changes = dict(num_layers=layer, ffn_dim=model.dense_width, moe=moe, memory=None, over_encoding=None)
    flops = count_flops(model.replace(**changes), sequence_length)
    return flops.forward - flops.parts["head"]


def _certain(name: str, size: float) -> Sent:
    return Sent(name, size, size)


def _seconds(size: float, gbps: float) -> float:
    return 8 * size / (gbps * 1e9)
