"""Bytes that a rank of a plan holds, role by role.

Backbone figures follow DeepSpeed 0.19.8 on float32: from stage 1 on it keeps a second copy of the weights that a rank's
optimizer moves, counted as optimizer state. Its message buffers are left out.
"""

from dataclasses import dataclass

from engram.config import ModelConfig
from engram.distributed.layout import ENTRY, FLOAT, INDEX, Group, Table
from engram.distributed.plan import Plan


@dataclass(frozen=True)
class Held:
    """Bytes of one role on one rank; the first four are on the device."""

    name: str
    parameters: int = 0
    gradients: int = 0
    state: int = 0
    # What lives for a part of a step.
    passing: int = 0
    host: int = 0
    file: int = 0

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.state + self.passing


def held_by(plan: Plan, rank: int) -> list[Held]:
    """Bytes on `rank`, role by role; activations are an estimate, DeepSpeed's message buffers are left out."""
    held = [_group(group, plan, rank) for group in plan.groups]
    held += [_table(table, plan, rank) for table in plan.tables]
    if plan.divides_tables or plan.config.train.tables is not None:
        held.append(_step_rows(plan, rank))
    held.append(Held("activations, estimated", passing=activation_bytes(plan)))
    if plan.config.train.async_checkpoints:
        held.append(Held("copies for checkpoints", host=_copies(plan, rank)))
    return held


def held_at_start(plan: Plan, rank: int) -> int:
    """Bytes of host memory before training: a rank draws the whole backbone, and has room for its rows."""
    tables = (_table(table, plan, rank) for table in plan.tables)
    return FLOAT * sum(group.elements for group in plan.groups) + sum(each.parameters + each.host for each in tables)


def _group(group: Group, plan: Plan, rank: int) -> Held:
    stage, offload = plan.settings.zero_stage, plan.settings.offload_optimizer
    whole, share = FLOAT * group.whole, FLOAT * group.share(rank)
    parameters = share if stage == 3 else whole
    if stage == 0:
        return Held(group.name, parameters, whole, group.moments * whole)
    state = (group.moments + 1) * share
    gradients = whole if stage == 1 else share
    if not offload:
        return Held(group.name, parameters, gradients, state)
    # Gradients lie beside the optimizer; stages 1 and 2 also return new weights through a buffer.
    host = state + share + (share if stage < 3 else 0)
    return Held(group.name, parameters, whole if stage == 1 else 0, host=host)


def _table(table: Table, plan: Plan, rank: int) -> Held:
    kind, storage = plan.config.optim.table.kind, plan.config.train.tables
    rows, state = len(table.ranges[rank]), plan.stored_row(table) - table.row_bytes
    if kind == "dense_adam":
        gradients = rows * table.settings.head_dim * FLOAT
    else:
        gradients = plan.rows_at_most(table, rank) * gradient_row(table)
    if storage is None:
        return Held(table.name, rows * table.row_bytes, gradients, rows * state)
    cached, stored = min(storage.cache_rows, rows), rows * plan.stored_row(table)
    return Held(
        table.name,
        cached * table.row_bytes,
        gradients,
        cached * state,
        host=stored if storage.tier == "host" else 0,
        file=stored if storage.tier == "file" else 0,
    )


def gradient_row(table: Table) -> int:
    return table.settings.head_dim * FLOAT + INDEX


def _step_rows(plan: Plan, rank: int) -> Held:
    """Rows that a rank reads in a step, their ids and the sums of their gradients; what of them is on its way."""
    passing = host = 0
    for table in plan.tables:
        vector, asked = table.settings.head_dim * FLOAT, asked_at_most(table, plan)
        passing += asked * (table.row_bytes + INDEX + vector)
        if plan.divides_tables:
            # Gradients once more as one message, and those that come from all ranks, before and after they are sorted
            # by table; messages of rows are no larger, and gone by then.
            from_all = plan.ranks * table.rows_at_most(table.ranges[rank], plan.tokens)
            passing += asked * vector + from_all * (2 * vector + INDEX)
        if plan.config.train.tables is not None:
            passing += plan.moving_bytes(table, rank)
            host += 2 * plan.moving_bytes(table, rank)
    return Held("rows of a step, at most", passing=passing, host=host)


def _copies(plan: Plan, rank: int) -> int:
    """Of the weights and moments that a rank writes: about its share of the backbone, and its rows."""
    backbone = sum(FLOAT * (1 + group.moments) * group.elements for group in plan.groups)
    rows = sum(
        (len(table.ranges[rank]) if plan.divides_tables else table.num_rows / plan.ranks) * plan.stored_row(table)
        for table in plan.tables
    )
    return round(backbone / plan.ranks + rows)


def activation_bytes(plan: Plan) -> int:
    """What one micro-batch leaves for its backward pass: the streams before each block and, of all blocks or with
    activation_checkpointing of one at a time, the inputs of their products. Good to about a factor of two.
    """
    model, train = plan.config.model, plan.config.train
    tokens = plan.tokens // plan.micro_batches
    streams = model.num_layers * model.hc_mult * model.hidden_size
    blocks = [_inside(model, layer) for layer in range(model.num_layers)]
    return tokens * (streams + (max(blocks) if train.activation_checkpointing else sum(blocks))) * compute_bytes(plan)


def _inside(model: ModelConfig, layer: int) -> int:
    """Entries of one token: inputs and outputs of the block's parts."""
    width, attention, moe = model.hidden_size, model.attention, model.moe
    heads = 2 * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    inner = model.dense_width
    if moe and model.is_moe_layer(layer):
        inner = moe.top_k * moe.expert_dim + moe.shared_width
    entries = heads + attention.kv_lora_rank + 3 * inner + 4 * width
    if model.hyper_connection:
        entries += 2 * model.hc_mult * width
    if model.memory and layer in model.memory.layer_ids:
        streams = model.hc_mult if model.memory.fusion == "per_stream" else 1
        entries += model.memory.d_mem + (3 * streams + 1) * width
    return entries


def compute_bytes(plan: Plan) -> int:
    return ENTRY[plan.config.train.dtype]


def asked_at_most(table: Table, plan: Plan) -> int:
    """Distinct rows that one rank reads in a step."""
    return table.rows_at_most(range(table.num_rows), plan.tokens)
