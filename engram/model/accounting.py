"""What a model costs before it is built: parameters, matrix-product FLOPs and bytes of training state, part by part.

Pure functions of the settings, without torch. `python -m engram.model.accounting CONFIG [a.b=c ...]` prints all of it.
"""

import sys
from dataclasses import dataclass
from functools import cached_property

from engram.config import Config, ConfigError, ModelConfig, NgramConfig, OptimConfig, load_config
from engram.memory.primes import distinct_primes

# Bytes of a float32, of an int32 and of an int64; and of a table's entry by `table_dtype`.
_FLOAT, _COUNT, _INDEX = 4, 4, 8
_STORED = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """All parameters of one kind, over all layers."""

    name: str
    # The optimizer role: `muon`, `adamw` or `table`.
    role: str
    parameters: int
    # Parameters that the forward pass of one token uses, and those of them that enter it through a matrix product.
    activated: int
    multiplied: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters without the vocabulary's two matrices, and those two apart, as the Engram paper counts them."""

    parts: tuple[Part, ...]
    # The input embedding and the head together.
    vocabulary: int

    @cached_property
    def total(self) -> int:
        return sum(part.parameters for part in self.parts)

    @cached_property
    def activated(self) -> int:
        """What the forward pass of one token uses: all dense parts, the top-k experts, the rows it reads."""
        return sum(part.activated for part in self.parts)

    @cached_property
    def memory(self) -> int:
        """Entries of all n-gram tables, those of OverEncoding included."""
        return sum(part.parameters for part in self.parts if part.role == "table")

    @property
    def sparse(self) -> int:
        return self.total - self.activated

    @cached_property
    def roles(self) -> dict[str, int]:
        """Parameters of each optimizer role; the vocabulary is AdamW's, so these sum to `total + vocabulary`."""
        counts = {"muon": 0, "adamw": self.vocabulary, "table": 0}
        for part in self.parts:
            counts[part.role] += part.parameters
        return counts


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations of matrix products for one token, a multiply-add being two."""

    parts: dict[str, int]

    @property
    def forward(self) -> int:
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        """Forward and backward, where every product has two products as its gradients; nothing is recomputed."""
        return 3 * self.forward


@dataclass(frozen=True)
class RoleBytes:
    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.state


@dataclass(frozen=True)
class ByteCounts:
    """Bytes held between the backward pass and the optimizer step; activations and compute-dtype copies come on top."""

    roles: dict[str, RoleBytes]

    @property
    def total(self) -> int:
        return sum(role.total for role in self.roles.values())


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """`total + vocabulary` is exactly what the built model holds; buffers are not counted."""
    parts = [*_attention(model), *_feed_forward(model), *_connections(model), *_memory(model), *_over_encoding(model)]
    return ParameterCounts(
        parts=tuple(part for part in parts if part.parameters), vocabulary=2 * model.vocab_size * model.hidden_size
    )


def count_flops(model: ModelConfig, sequence_length: int) -> FlopCounts:
    """FLOPs of one token, averaged over the positions of a sequence; position t attends to t + 1 positions.

    Element-wise work (norms, gates, the depthwise convolution, Sinkhorn) is not counted.
    """
    attention = model.attention
    counts: dict[str, int] = {}
    for part in count_parameters(model).parts:
        if part.multiplied:
            counts[part.name] = counts.get(part.name, 0) + 2 * part.multiplied
    # 2 FLOPs x (T + 1) / 2 positions on average, for the scores and for the weighted sum of values.
    counts["attention scores"] = (
        model.num_layers * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim) * (sequence_length + 1)
    )
    if model.hyper_connection:
        # Each connection reads one stream from G, mixes G into G and writes one back to G; the readout only reads.
        streams = model.hc_mult
        products = _num_connections(model) * (streams * streams + 2 * streams) + streams
        counts["stream mixing"] = 2 * products * model.hidden_size
    counts["head"] = 2 * model.vocab_size * model.hidden_size
    return FlopCounts(counts)


def count_bytes(model: ModelConfig, optim: OptimConfig, tokens_per_step: int) -> ByteCounts:
    """Bytes of parameters, gradients and optimizer state by role, over all ranks together: all are float32, but tables
    as `table_dtype` says.

    The tables' gradients are row-sparse: one row and one index for each row that `tokens_per_step` tokens read, here as
    many as if all differed. `dense_adam` takes gradients as large as the tables.
    """
    counts = count_parameters(model)
    muon, adamw, table = (counts.roles[role] * _FLOAT for role in ("muon", "adamw", "table"))
    rows = gradients = stored = 0
    for tables, num_rows in _tables(model):
        rows += num_rows
        stored += num_rows * tables.head_dim * _STORED[tables.table_dtype]
        reads = tokens_per_step * tables.d_mem // tables.head_dim
        gradients += min(reads, num_rows) * (tables.head_dim * _FLOAT + _INDEX)
    # Row Adam also counts each row's updates (int32).
    state = {
        "row_adam": 2 * table + rows * _COUNT,
        "rowwise_adagrad": rows * _FLOAT,
        "sinkhorn": table,
        "dense_adam": 2 * table,
    }
    if optim.table.kind == "dense_adam":
        gradients = table
    return ByteCounts(
        {
            "muon": RoleBytes(muon, muon, muon if optim.muon else 2 * muon),
            "adamw": RoleBytes(adamw, adamw, 2 * adamw),
            "table": RoleBytes(stored, gradients, state[optim.table.kind]),
        }
    )


def rho(model: ModelConfig) -> float:
    """The experts' share of the sparse parameters: 1 without memory, 0 without experts (Engram paper, section 3.1)."""
    counts = count_parameters(model)
    experts = sum(part.parameters - part.activated for part in counts.parts if part.name == "routed experts")
    return experts / counts.sparse if counts.sparse else 1.0


def _matrix(name: str, size: int, copies: int = 1, used: int | None = None, role: str = "muon") -> Part:
    """`copies` matrices of `size` entries, of which one token's products use `used` (all if not given)."""
    activated = size * (copies if used is None else used)
    return Part(name, role, size * copies, activated, activated)


def _vector(name: str, size: int, copies: int = 1) -> Part:
    """Gains, biases and mixing coefficients: element-wise, and AdamW's."""
    return Part(name, "adamw", size * copies, size * copies, 0)


def _attention(model: ModelConfig) -> list[Part]:
    width, layers, attention = model.hidden_size, model.num_layers, model.attention
    queries, rank = attention.num_heads * attention.qk_head_dim, attention.q_lora_rank
    keys_values = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    size = (
        (width * rank + rank * queries if rank else width * queries)
        + width * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        + attention.kv_lora_rank * keys_values
        + attention.num_heads * attention.v_head_dim * width
    )
    norms = 2 * width + attention.kv_lora_rank + (rank or 0)
    return [_matrix("attention", size, layers), _vector("norms", layers * norms + width)]


def _feed_forward(model: ModelConfig) -> list[Part]:
    width, moe = model.hidden_size, model.moe
    sparse_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    parts = [_matrix("dense feed-forward", 3 * width * model.dense_width, model.num_layers - sparse_layers)]
    if moe:
        expert = 3 * width * moe.expert_dim
        parts += [
            _matrix("routed experts", expert, sparse_layers * moe.num_experts, used=sparse_layers * moe.top_k),
            _matrix("shared experts", 3 * width * moe.shared_width, sparse_layers),
            _matrix("router", width * moe.num_experts, sparse_layers, role="adamw"),
        ]
    return parts


def _num_connections(model: ModelConfig) -> int:
    """Hyper-connections: one around each attention, each feed-forward layer, and each memory that fuses as they do."""
    memories = len(model.memory.layer_ids) if model.memory and model.memory.fusion == "single" else 0
    return 2 * model.num_layers + memories


def _connections(model: ModelConfig) -> list[Part]:
    if not model.hyper_connection:
        return []
    streams, connections = model.hc_mult, _num_connections(model)
    # Read, write and mixing coefficients of a connection, and the read coefficients of the readout.
    coefficients = connections * (2 * streams + streams * streams) + streams
    return [
        _matrix("hyper-connections", streams * model.hidden_size, coefficients, role="adamw"),
        _vector("hyper-connections", coefficients + 3 * connections + 1),
    ]


def _tables(model: ModelConfig) -> list[tuple[NgramConfig, int]]:
    """Every n-gram table with its number of rows."""
    found: list[tuple[NgramConfig, int]] = []
    if model.memory:
        primes = distinct_primes(model.memory.layer_ids, model.memory.rows_per_head, model.memory.num_heads)
        found += [(model.memory, sum(map(sum, orders))) for orders in primes.values()]
    if model.over_encoding:
        [orders] = distinct_primes([0], model.over_encoding.rows_per_head, model.over_encoding.num_heads).values()
        found.append((model.over_encoding, sum(map(sum, orders))))
    return found


def _memory(model: ModelConfig) -> list[Part]:
    memory = model.memory
    if not memory:
        return []
    modules = len(memory.layer_ids)
    channels = model.hidden_size * (model.hc_mult if memory.fusion == "per_stream" else 1)
    # One key for each stream, and the value; without a gate they are held all the same.
    projected = channels + model.hidden_size
    rows = sum(num_rows for tables, num_rows in _tables(model) if tables is memory)
    return [
        Part("memory tables", "table", rows * memory.head_dim, modules * memory.d_mem, 0),
        _matrix("memory projections", projected * memory.d_mem, modules),
        _vector("memory projections", projected if memory.projection_bias else 0, modules),
        _vector("memory gains", 2 * channels, modules),
        _vector("memory convolution", channels * (memory.conv.kernel_size + 1) if memory.conv else 0, modules),
    ]


def _over_encoding(model: ModelConfig) -> list[Part]:
    tables = model.over_encoding
    if not tables:
        return []
    rows = sum(num_rows for found, num_rows in _tables(model) if found is tables)
    return [
        Part("over-encoding tables", "table", rows * tables.head_dim, tables.d_mem, 0),
        _matrix("over-encoding projection", tables.d_mem * model.hidden_size),
    ]


def table_rows(model: ModelConfig) -> int:
    """Rows of all n-gram tables, after each head's number became a prime."""
    return sum(num_rows for _, num_rows in _tables(model))


def describe(config: Config) -> str:
    """Tables of parameters and FLOPs by part and of bytes by role, and one line that sums up the run."""
    counts, length = count_parameters(config.model), config.data.sequence_length
    flops = count_flops(config.model, length)
    names = list(dict.fromkeys([part.name for part in counts.parts] + list(flops.parts)))
    lines = [f"{'part':26}{'parameters':>18}{'activated':>16}{'FLOPs / token':>18}"]
    for name in names:
        same = [part for part in counts.parts if part.name == name]
        parameters, activated = sum(part.parameters for part in same), sum(part.activated for part in same)
        lines.append(f"{name:26}{parameters:18,}{activated:16,}{flops.parts.get(name, 0):18,}")
    lines.append(f"{'total':26}{counts.total:18,}{counts.activated:16,}{flops.forward:18,}")
    lines.append(f"{'vocabulary (two matrices)':26}{counts.vocabulary:18,}\n")
    lines.append(f"{'role, GB':26}{'parameters':>18}{'gradients':>16}{'optimizer state':>18}")
    for role, size in count_bytes(config.model, config.optim, config.tokens_per_step).roles.items():
        lines.append(f"{role:26}{size.parameters / 1e9:18,.3f}{size.gradients / 1e9:16,.3f}{size.state / 1e9:18,.3f}")
    lines.append(f"\n{cost(config)}; rho {rho(config.model):.3f}")
    return "\n".join(lines)


def cost(config: Config) -> str:
    """One line: parameters without the vocabulary, tokens and training FLOPs of the whole run, bytes of its state."""
    counts, tokens = count_parameters(config.model), config.train.steps * config.tokens_per_step
    state = _short(count_bytes(config.model, config.optim, config.tokens_per_step).total, units="KMGT")
    flops = tokens * count_flops(config.model, config.data.sequence_length).training
    return (
        f"{_short(counts.total)} parameters ({_short(counts.activated)} activated, {_short(counts.memory)} memory), "
        f"{_short(tokens)} tokens, {flops:.1e} FLOPs, {state}B of state"
    )


def _short(count: int, units: str = "KMBT") -> str:
    """Two decimals and a unit of 1000, 1000^2, ..."""
    power = min((len(str(count)) - 1) // 3, len(units))
    return f"{count / 1000**power:.2f} {units[power - 1]}" if power else str(count)


if __name__ == "__main__":
    try:
        print(describe(load_config(sys.argv[1], sys.argv[2:])))
    except (IndexError, ConfigError) as error:
        print(error if isinstance(error, ConfigError) else "usage: CONFIG [a.b=c ...]", file=sys.stderr)
        sys.exit(2)
