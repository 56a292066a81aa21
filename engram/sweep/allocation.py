"""One budget of inactive parameters, shared between experts and n-gram memory (Engram paper, section 3.1)."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from engram.config import ConfigError, MemoryConfig, ModelConfig, MoEConfig
from engram.model.accounting import count_parameters
from engram.model.accounting import rho as counted_rho
from engram.sweep.widths import Unreachable, narrowed

# What whole experts and rows may leave of a difference from the total of the model without memory.
TOTAL_TOLERANCE = 0.005
_FEWEST_ROWS = 2


@dataclass(frozen=True)
class Accounting:
    """What a model of an allocation holds, beside the model without memory that it has to match.

    Deviations are relative to that base: 0.01 is 1 % more. The paper leaves out what memory adds besides its tables:
    `paper_total` and `paper_activated` are counted its way, `total` and `activated` count everything.
    """

    rho: float
    experts: int
    rows_per_head: tuple[int, ...]
    shared_dim: int
    ffn_dim: int
    total: int
    total_deviation: float
    activated: int
    activated_deviation: float
    # Projections, gains, convolution and the rows that one token reads.
    added_by_memory: int
    paper_total: int
    paper_total_deviation: float
    paper_activated: int
    paper_activated_deviation: float


def allocate(model: ModelConfig, rho: float, compensate: bool = True) -> ModelConfig:
    """The model whose experts keep the share `rho` of the sparse parameters; n-gram tables take the rest.

    `model` has both axes: `moe` with the experts of rho = 1, and `memory`, whose rows are ignored. Experts are
    top_k + round(rho (E - top_k)), and `rows_per_head` (one number for all orders, counted after it became primes)
    brings the total to that of `model` without memory, within 0.5 %. rho = 1 returns exactly that model.

    compensate: narrower shared experts and dense layers pay for what memory adds to the activated parameters (less
    the router's rows of the experts that went), which stay within 1 %. False: the paper's accounting; widths stay, the
    sparse parameters match, and what memory adds is extra in total and activated (`achieved` says how much).

    Raises ConfigError: a ratio out of reach (names the feasible range), memory too wide to be paid for with half of
    the widths (names the largest d_mem that fits), or a model that lacks one of the two axes.
    """
    moe, _ = _axes(model)
    if rho == 1:
        return model.replace(memory=None)
    # NaN fails this comparison too.
    if not 0 <= rho < 1:
        raise ConfigError(f"rho is {rho}: {_reach(model, compensate)}")
    experts = moe.num_groups * round((moe.top_k + round(rho * (moe.num_experts - moe.top_k))) / moe.num_groups)
    try:
        return _with_experts(model, experts, compensate)
    except Unreachable as reason:
        message = f"rho {rho} means {experts} of {moe.num_experts} experts, {reason}: {_reach(model, compensate)}"
        raise ConfigError(message) from None


def feasible_range(model: ModelConfig, compensate: bool = True) -> tuple[float, float]:
    """The ratios of the fewest and of the most experts that leave room for memory; (1, 1) if none do.

    A ratio counts as the nearest number of experts. rho = 1, the model without memory, is feasible besides.
    """
    moe, _ = _axes(model)
    counts = range(_fewest_experts(moe), moe.num_experts, moe.num_groups)

    def fits(experts: int) -> bool:
        try:
            _with_experts(model, experts, compensate)
        except (Unreachable, ConfigError):
            return False
        return True

    ends = [next(filter(fits, order), moe.num_experts) for order in (counts, reversed(counts))]
    low, high = ((experts - moe.top_k) / (moe.num_experts - moe.top_k) for experts in ends)
    return low, high


def achieved(model: ModelConfig, base: ModelConfig) -> Accounting:
    """Counts of `model`, which `allocate` made of `base`."""
    counts, target = count_parameters(model), count_parameters(base.replace(memory=None))
    added = counts.activated - count_parameters(model.replace(memory=None)).activated
    # The rows that a token reads are part of the tables, which the paper does count in the total.
    read = len(model.memory.layer_ids) * model.memory.d_mem if model.memory else 0
    paper_total, paper_activated = counts.total - (added - read), counts.activated - added
    return Accounting(
        rho=counted_rho(model),
        experts=model.moe.num_experts if model.moe else 0,
        rows_per_head=model.memory.rows_per_head if model.memory else (),
        shared_dim=model.moe.shared_width if model.moe else 0,
        ffn_dim=model.dense_width,
        total=counts.total,
        total_deviation=counts.total / target.total - 1,
        activated=counts.activated,
        activated_deviation=counts.activated / target.activated - 1,
        added_by_memory=added,
        paper_total=paper_total,
        paper_total_deviation=paper_total / target.total - 1,
        paper_activated=paper_activated,
        paper_activated_deviation=paper_activated / target.activated - 1,
    )


def _axes(model: ModelConfig) -> tuple[MoEConfig, MemoryConfig]:
    if model.moe is None or model.memory is None:
        missing = "moe" if model.moe is None else "memory"
        raise ConfigError(
            f"model.{missing} is null, but an allocation needs both axes: model.moe with the experts of rho = 1, and "
            "model.memory with the tables' geometry (its rows_per_head are ignored)"
        )
    if model.moe.num_experts == model.moe.top_k:
        raise ConfigError(
            f"every token uses all {model.moe.top_k} experts, so that there are no inactive parameters to share: "
            "raise moe.num_experts or lower moe.top_k"
        )
    if not model.is_moe_layer(model.num_layers - 1):
        raise ConfigError(
            f"moe.num_dense_layers is {model.moe.num_dense_layers} of {model.num_layers} layers, which leaves no "
            "layer with experts: lower it"
        )
    return model.moe, model.memory


def _fewest_experts(moe: MoEConfig) -> int:
    """Group-limited routing finds its top_k experts within `top_k_groups` groups."""
    return moe.num_groups * math.ceil(moe.top_k / moe.top_k_groups)


def _reach(model: ModelConfig, compensate: bool) -> str:
    low, high = feasible_range(model, compensate)
    if low == 1:
        return "of this model, only rho = 1 (no memory) is feasible"
    return f"feasible are ratios from {low:.4g} to {high:.4g}, and 1 (no memory)"


def _with_experts(model: ModelConfig, experts: int, compensate: bool) -> ModelConfig:
    """Raises Unreachable, and ConfigError where memory is too wide."""
    moe, memory = _axes(model)
    if experts < _fewest_experts(moe):
        raise Unreachable(f"but routing needs {_fewest_experts(moe)}")
    if experts >= moe.num_experts:
        raise Unreachable("which frees no parameters for memory")
    base = count_parameters(model.replace(memory=None))
    rows = (_FEWEST_ROWS,) * len(memory.orders)
    changed = model.replace(moe=moe.replace(num_experts=experts), memory=memory.replace(rows_per_head=rows))
    if compensate:
        changed = narrowed(changed, base.activated)
    target = base.total if compensate else base.sparse + count_parameters(changed).activated
    changed = _with_total(changed, target)
    total = count_parameters(changed).total
    if abs(total - target) > TOTAL_TOLERANCE * base.total:
        raise Unreachable(f"and rows of whole tables bring the total to {total:,} instead of {target:,}")
    return changed


def _with_total(model: ModelConfig, target: int) -> ModelConfig:
    """`model` with the rows whose primes bring its total nearest to `target`."""
    memory = model.memory
    assert memory is not None
    counts = count_parameters(model)
    others = counts.total - sum(part.parameters for part in counts.parts if part.name == "memory tables")
    tables = len(memory.layer_ids) * len(memory.orders) * memory.num_heads
    exact = (target - others) / (tables * memory.head_dim)
    if exact < _FEWEST_ROWS:
        raise Unreachable(f"which leaves {max(exact, 0):.2g} rows for each head's table, and {_FEWEST_ROWS} are needed")

    def with_rows(rows: int) -> ModelConfig:
        return model.replace(memory=memory.replace(rows_per_head=(rows,) * len(memory.orders)))

    def total(rows: int) -> int:
        return count_parameters(with_rows(rows)).total

    # A prime is never below its number of rows, so this many are too many. As primes near n lie about log n apart, the
    # tables exceed it by half of tables x log n on average; the search starts twice as far below.
    above = math.floor(exact) + 1
    below = max(_FEWEST_ROWS, above - math.ceil(tables * math.log(above)))
    if total(below) > target:
        below = _FEWEST_ROWS
    more = below + bisect_right(range(below, above), target, key=total)
    return with_rows(min({max(more - 1, _FEWEST_ROWS), more}, key=lambda rows: abs(total(rows) - target)))
