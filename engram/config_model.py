"""The model's part of the space of experiments: `model` in a config file (engram/config.py has the rest).

Presence is the switch: `memory: null` is the mixture-of-experts baseline, `moe: null` is dense,
`hyper_connection: null` is a plain residual stream. Layer ids count from 0.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engram.config_base import Count, Index, NonNegative, Positive, Seed, Settings


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
