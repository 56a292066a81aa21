"""Whether settings go together on so many ranks, and who then holds what: before anything is allocated.

What goes together (x); everything else is refused, with the numbers and what to change.

    distributed.zero_stage      0  1  2  3
    offload_optimizer           -  x  x  x
    train.compile               x  x  x  -
    train.statistics_every      x  x  x  -

    rows of n-gram tables                               device   train.tables: host or file
    table_ranks null, one rank                             x          x
    table_ranks null, several ranks                        x          -
    table_ranks all, or a number                           x          x
    table.kind row_adam or rowwise_adagrad                 x          x
    table.kind sinkhorn or dense_adam (move all rows)      x          -
    train.async_checkpoints                                x       host only
    over_encoding, with table_ranks null                   x          -
    over_encoding, with table_ranks all, or a number       -          -

Every other pair of settings goes together, ZeRO's stages and divided experts with all kinds of tables.
"""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from engram.config import Config, ConfigError, DistributedConfig, ModelConfig, UserError
from engram.distributed.layout import Group, Table, backbone_groups, tables_of
from engram.distributed.row_ranges import table_owners


@dataclass(frozen=True)
class Plan:
    """A config on `ranks` ranks: groups of the backbone's parameters, and tables."""

    config: Config
    ranks: int
    groups: tuple[Group, ...]
    tables: tuple[Table, ...]

    @property
    def settings(self) -> DistributedConfig:
        """Those of ranks; one process holds everything, as in stage 0."""
        return self.config.distributed or DistributedConfig(zero_stage=0)

    @property
    def divides_tables(self) -> bool:
        return self.settings.table_ranks is not None

    @property
    def sequences(self) -> int:
        """Of one rank in one step."""
        return self.config.train.batch_size // self.ranks

    @property
    def micro_batches(self) -> int:
        return self.sequences // (self.config.train.micro_batch_size or self.sequences)

    @property
    def tokens(self) -> int:
        """Of one rank in one step."""
        return self.sequences * self.config.data.sequence_length

    @property
    def tokens_for_owner(self) -> int:
        """Tokens whose reads of a step reach the rank that holds a row: those of all ranks."""
        return self.config.tokens_per_step

    @property
    def evaluated_tokens(self) -> int:
        """Of one batch of an evaluation on all ranks together, with what fills up their equal shares."""
        sequences = -(-self.config.eval.batch_size // self.ranks) * self.ranks
        return sequences * self.config.data.sequence_length

    def rows_at_most(self, table: Table, rank: int) -> int:
        """Distinct rows that this rank holds and that a step may read."""
        return table.rows_at_most(table.ranges[rank], self.tokens_for_owner)

    def stored_row(self, table: Table) -> int:
        """Bytes of a row and its optimizer state."""
        return table.row_bytes + table.state_bytes(self.config.optim.table.kind)

    def moving_bytes(self, table: Table, rank: int) -> int:
        """At most, of stored rows that come for the next step, or that go; each at once in host memory."""
        return self.rows_at_most(table, rank) * self.stored_row(table)


def make_plan(config: Config, ranks: int) -> Plan:
    """Raises UserError where the settings do not go together, do not fit the number of ranks, or leave no room."""
    _check_batch(config, ranks)
    settings = config.distributed or DistributedConfig(zero_stage=0)
    _check_stage(config, settings)
    check_expert_ranks(config.model, settings.expert_ranks, ranks)
    owners = _check_division(config.model, settings, ranks)
    plan = Plan(config, ranks, backbone_groups(config, ranks), tables_of(config, owners, ranks))
    if config.train.tables is not None:
        _check_storage(plan)
        _check_cache(plan)
        _check_host_memory(plan)
    return plan


def check_launch(config: Config, ranks: int) -> None:
    """Raises UserError where ranks were started that the config knows nothing of."""
    if config.distributed is None and ranks > 1:
        raise UserError(f"{ranks} ranks were started, but distributed is null: give distributed={{}}, or start one")


def _check_batch(config: Config, ranks: int) -> None:
    check_launch(config, ranks)
    if config.distributed is None:
        return
    train = config.train
    if train.batch_size % ranks:
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be shared equally by {ranks} ranks: make it a multiple of "
            f"{ranks}"
        )
    share = train.batch_size // ranks
    if train.micro_batch_size and share % train.micro_batch_size:
        raise ConfigError(
            f"train.micro_batch_size {train.micro_batch_size} does not divide the {share} sequences of one of "
            f"{ranks} ranks: lower it to a divisor of {share}"
        )


def _check_stage(config: Config, settings: DistributedConfig) -> None:
    if settings.zero_stage == 3:
        for name in ("statistics_every", "compile"):
            if getattr(config.train, name):
                raise ConfigError(f"train.{name} needs distributed.zero_stage 0, 1 or 2: stage 3 divides the layers")


def check_expert_ranks(model: ModelConfig, expert_ranks: int, world_size: int) -> None:
    """Raises UserError where the experts or the ranks cannot be divided so."""
    if expert_ranks == 1:
        return
    setting = f"distributed.expert_ranks is {expert_ranks}"
    if model.moe is None:
        raise UserError(f"{setting}, but the model has no experts (model.moe is null): set it to 1")
    experts = model.moe.num_experts
    most = math.gcd(experts, world_size)
    if most % expert_ranks:
        fit = ", ".join(str(ranks) for ranks in range(1, most + 1) if most % ranks == 0)
        raise UserError(
            f"{setting}, but it must divide both model.moe.num_experts {experts} and the number of ranks "
            f"{world_size}: choose one of {fit}"
        )


def _check_division(model: ModelConfig, settings: DistributedConfig, ranks: int) -> int | None:
    """How many ranks share the rows of the tables; None: each holds all."""
    if settings.table_ranks is None:
        return None
    setting = f"distributed.table_ranks is {settings.table_ranks!r}"
    if model.over_encoding is not None:
        raise ConfigError(f"{setting}, but tables of model.over_encoding cannot be divided: set it to null")
    if model.memory is None:
        raise ConfigError(f"{setting}, but the model has no tables (model.memory is null): set it to null")
    return table_owners(settings.table_ranks, ranks)


def _check_storage(plan: Plan) -> None:
    model, kind, storage = plan.config.model, plan.config.optim.table.kind, plan.config.train.tables
    assert storage is not None
    setting = f"train.tables.tier is {storage.tier!r}"
    if model.over_encoding is not None:
        raise ConfigError(f"{setting}, but model.over_encoding keeps its rows on the device: set train.tables to null")
    if model.memory is None:
        raise ConfigError(f"{setting}, but the model has no tables (model.memory is null): set train.tables to null")
    if kind in ("sinkhorn", "dense_adam"):
        raise ConfigError(
            f"{setting}, but optim.table.kind {kind} moves all rows in every step: use row_adam or rowwise_adagrad, "
            "which move those that were read, or set train.tables to null"
        )
    if plan.config.train.async_checkpoints and storage.tier == "file":
        raise ConfigError(
            f"{setting}, but train.async_checkpoints copies all rows and their optimizer state into host memory, which "
            "files are there to spare: set train.async_checkpoints to false, or use tier host"
        )
    if plan.ranks > 1 and not plan.divides_tables:
        raise ConfigError(
            f"{setting}, and each of {plan.ranks} ranks would keep and update all rows by itself: divide them among "
            "the ranks with distributed.table_ranks=all"
        )


def _check_cache(plan: Plan) -> None:
    config, storage = plan.config, plan.config.train.tables
    assert storage is not None
    steps = ("step", plan.tokens_for_owner, f"train.batch_size (now {config.train.batch_size})")
    evaluations = ("batch of an evaluation", plan.evaluated_tokens, f"eval.batch_size (now {config.eval.batch_size})")
    # The larger need is told, so that one change serves both.
    rows, rank, table, (what, tokens, setting) = max(
        (
            (table.rows_at_most(table.ranges[rank], batch[1]), rank, table, batch)
            for batch in (steps, evaluations)
            for table in plan.tables
            for rank in range(plan.ranks)
        ),
        key=lambda each: each[0],
    )
    if storage.cache_rows < rows:
        raise ConfigError(
            f"train.tables.cache_rows is {storage.cache_rows}, but a {what} of {tokens:,} tokens may read {rows} rows "
            f"that rank {rank} holds of the {table.name}: raise it to {rows}, or lower {setting} or "
            f"data.sequence_length (now {config.data.sequence_length})"
        )


def _check_host_memory(plan: Plan) -> None:
    storage = plan.config.train.tables
    assert storage is not None
    if storage.host_memory_gb is None:
        return

    def needed(rank: int) -> int:
        """Rows with their state: those that come and go in one step, and in tier host all of them."""
        return sum(
            2 * plan.moving_bytes(table, rank)
            + (len(table.ranges[rank]) * plan.stored_row(table) if storage.tier == "host" else 0)
            for table in plan.tables
        )

    rank = max(range(plan.ranks), key=needed)
    most = needed(rank) / 1e9
    if most > storage.host_memory_gb:
        enough = _rounded_up(most)
        what, advice = (
            (
                "all rows, and those that come and go in a step,",
                "use tier file, or divide the rows among more ranks (distributed.table_ranks)",
            )
            if storage.tier == "host"
            else ("the rows that come and go in a step", "lower train.batch_size or data.sequence_length")
        )
        raise ConfigError(
            f"train.tables.host_memory_gb is {storage.host_memory_gb}, but {what} on rank {rank} take {enough:g} GB "
            f"with their optimizer state: raise it to {enough:g}, or {advice}"
        )


def _rounded_up(size: float) -> float:
    """The smallest number of four digits that is not below `size`: what a message names must be enough."""
    unit = Decimal(1).scaleb(Decimal(size).adjusted() - 3)
    return float((Decimal(size) / unit).to_integral_value(ROUND_CEILING) * unit)
