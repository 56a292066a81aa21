"""Settings of runs on several ranks, and of where the rows of n-gram tables are stored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from engram.config_base import Count, Name, Positive, Settings


class TableStorageConfig(Settings):
    """Tables larger than the device: a cache of rows there, all rows in host memory or in a file."""

    tier: Literal["host", "file"]
    # Rows of each table that are held on the device, with their optimizer state. All rows that a step reads must fit.
    cache_rows: Count
    # `file`: the folder of the row files, which have no names there; null: the run folder.
    folder: Name | None = None
    # Bytes that the rows may take in host memory, in GB; null: whatever the machine has.
    host_memory_gb: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tier == "host" and self.folder is not None:
            raise ValueError(f"folder is {self.folder!r}, but tier host keeps rows in memory: use tier file")
        return self


class DistributedConfig(Settings):
    """Several ranks, started by torchrun, by `deepspeed` or by Slurm, as one run."""

    # DeepSpeed's ZeRO for all parameters but the tables: 0 all ranks hold everything, 1 optimizer state is divided
    # among them, 2 gradients too, 3 parameters too.
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    # The backbone's optimizer state in host memory (ZeRO 1 to 3).
    offload_optimizer: bool = False
    # Rows of the tables are divided among all ranks, or among the first so many; null: every rank holds all rows.
    table_ranks: Literal["all"] | Count | None = None
    # Ranks among which the routed experts are divided; 1: every rank holds all experts.
    expert_ranks: Count = 1
    # Longest wait for another rank.
    timeout_seconds: Count = 600

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, which divide the optimizer's state")
        return self
