"""Contests of the backbone's operations in the shapes of a config, and of a block with and without memory.

Legend: B batch, L length, T tokens, D hidden size, E experts, F expert width, K experts of a token, H heads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import Contender, Contest, Run
from benchmarks.kernel_inputs import Sizes, normal, short, zipf_tokens
from benchmarks.kernel_peers import grouped_mm_experts
from benchmarks.memory_contests import on_gpu
from benchmarks.passes import BOTH, Operation
from benchmarks.targets import Overhead, Speedup
from engram.config import ModelConfig, load_config
from engram.kernels.causal_attention import causal_attention, causal_attention_ref
from engram.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from engram.kernels.moe_experts import moe_experts, moe_experts_ref
from engram.model.rope import inverse_frequencies, rope_tables, table_scale
from engram.model.transformer import Transformer

# The worst of millions of elements in bfloat16 beside float32 throughout; a wrong element is off by 1 and more.
TOLERANCE = 0.3
PAPER_LAYERS, PAPER_MEMORY_LAYERS = 30, 2


def experts(sizes: Sizes, device: str) -> Iterator[Contest]:
    model, generator = load_config(sizes.config).model, torch.Generator(device).manual_seed(5)
    moe, tokens, width = model.moe, sizes.model_tokens[0] * sizes.model_tokens[1], model.hidden_size
    assert moe is not None
    # Loads as uneven as those of a young router.
    popularity_E = torch.randn(moe.num_experts, generator=generator, device=device)
    noise_TE = torch.randn(tokens, moe.num_experts, generator=generator, device=device)
    ids_TK = (popularity_E * 0.5 + noise_TE).topk(moe.top_k, dim=-1).indices
    x = normal(tokens, width, generator=generator, dtype=sizes.dtype)
    weights_TK = torch.rand(tokens, moe.top_k, generator=generator, device=device)
    gate_up = normal(moe.num_experts, 2, moe.expert_dim, width, generator=generator).mul_(width**-0.5)
    down = normal(moe.num_experts, width, moe.expert_dim, generator=generator).mul_(moe.expert_dim**-0.5)

    def on_ids(function):  # type: ignore[no-untyped-def]
        return lambda x, *weights: [function(x, ids_TK, *weights)]

    operation = Operation(
        op="experts",
        title=f"{tokens:,} tokens x {width}, {moe.top_k} of {moe.num_experts} experts x {moe.expert_dim}, "
        f"{short(sizes.dtype)}",
        reference=on_ids(moe_experts_ref),
        inputs=[t.requires_grad_() for t in (x, weights_TK, gate_up.to(sizes.dtype), down.to(sizes.dtype))],
        cotangents=[normal(tokens, width, generator=generator, dtype=sizes.dtype)],
        ways={
            "expert by expert": lambda: on_ids(moe_experts_ref),
            "grouped_mm": lambda: on_ids(grouped_mm_experts),
            "grouped_mm, compiled": lambda: torch.compile(on_ids(grouped_mm_experts)),
            "ours": lambda: on_ids(moe_experts),
        },
        tolerance=TOLERANCE,
    )
    yield operation.contest(BOTH, targets=on_gpu(device, Speedup("ours", ["grouped_mm", "grouped_mm, compiled"], 1.4)))


def head_losses(sizes: Sizes, device: str) -> Iterator[Contest]:
    model, generator = load_config(sizes.config).model, torch.Generator(device).manual_seed(6)
    tokens, width, vocabulary = sizes.loss_tokens, model.hidden_size, model.vocab_size
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    x = normal(tokens, width, generator=generator, dtype=sizes.dtype)
    weight = normal(vocabulary, width, generator=generator).mul_(width**-0.5)

    def whole_logits(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        logits = x @ weight.to(x.dtype).t()
        return [F.cross_entropy(logits.float(), targets_T, reduction="sum")]

    def torchs_chunks(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        options = torch.nn.LinearCrossEntropyOptions()
        return [F.linear_cross_entropy(x, weight.to(x.dtype), targets_T, reduction="sum", options=options)]

    def ours(x: Tensor, weight: Tensor, compiled: bool = False) -> Sequence[Tensor]:
        return [linear_cross_entropy(x, weight, targets_T, compiled=compiled)]

    yield Operation(
        op="head_loss",
        title=f"{tokens:,} tokens x {width}, {vocabulary:,} words, {short(sizes.dtype)}",
        reference=lambda x, weight: [linear_cross_entropy_ref(x, weight, targets_T).sum()],
        inputs=[x.requires_grad_(), weight.requires_grad_()],
        cotangents=[torch.tensor(1 / tokens, device=device)],
        ways={
            "F.cross_entropy": lambda: whole_logits,
            "F.cross_entropy, compiled": lambda: torch.compile(whole_logits),
            "F.linear_cross_entropy": lambda: torchs_chunks,
            "ours": lambda: ours,
            "ours, compiled": lambda: lambda x, weight: ours(x, weight, compiled=True),
        },
        tolerance=TOLERANCE,
    ).contest(BOTH)


def attentions(sizes: Sizes, device: str) -> Iterator[Contest]:
    config, generator = load_config(sizes.config).model.attention, torch.Generator(device).manual_seed(7)
    batch, length = sizes.attention_tokens
    widths = (config.qk_head_dim, config.qk_head_dim, config.v_head_dim)
    q, k, v = (normal(batch, config.num_heads, length, w, generator=generator, dtype=sizes.dtype) for w in widths)
    scale = config.qk_head_dim**-0.5

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        # CPU's fused kernel wants values as wide as queries; on CUDA other kernels than the slow one do not.
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if device == "cpu" else v
        return [F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scale)[..., : v.shape[-1]]]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        return [causal_attention(q, k, v, None, scale)]

    yield Operation(
        op="attention",
        title=f"{batch} x {config.num_heads} heads x {length}, keys {widths[0]}, values {widths[2]}, "
        f"{short(sizes.dtype)}",
        reference=lambda q, k, v: [causal_attention_ref(q, k, v, None, scale)],
        inputs=[tensor.requires_grad_() for tensor in (q, k, v)],
        cotangents=[normal(*v.shape, generator=generator, dtype=sizes.dtype)],
        ways={
            "F.scaled_dot_product_attention": lambda: torchs,
            "ours": lambda: ours,
            "ours, compiled": lambda: torch.compile(ours),
        },
        tolerance=TOLERANCE,
    ).contest(BOTH)


def blocks(sizes: Sizes, device: str) -> Iterator[Contest]:
    """A block of experts with and without a memory layer. There is no reference: tests compare the whole model."""
    model = load_config(sizes.config).model
    assert model.memory is not None
    # One dense block that does not run, one with experts: no more has to fit.
    model = model.replace(num_layers=2, memory=model.memory.model_copy(update={"layer_ids": (1,)}))
    without = model.replace(memory=None)
    batch, length = sizes.block_tokens
    share = PAPER_MEMORY_LAYERS / PAPER_LAYERS
    yield Contest(
        "block",
        f"block: {batch * length:,} tokens x {model.hidden_size}, forward and backward, {short(sizes.dtype)}",
        lambda: [],
        [
            Contender("without memory", lambda: block_run(without, sizes, device), None),
            Contender("with memory", lambda: block_run(model, sizes, device), None),
        ],
        # Engram-27B has memory in 2 of its 30 blocks: its step time changes by that share of a block's change.
        on_gpu(device, Overhead("with memory", "without memory", 0.05, share)),
    )


def block_run(model: ModelConfig, sizes: Sizes, device: str) -> Run:
    generator = torch.Generator(device).manual_seed(8)
    with torch.device(device):
        transformer = Transformer(model).train()
    transformer.compile_blocks()
    block = transformer.blocks[1]
    tokens = zipf_tokens(sizes.block_tokens, model.vocab_size, generator)
    x = normal(*tokens.shape, model.hc_mult, model.hidden_size, generator=generator, dtype=sizes.dtype)
    cotangent = normal(*x.shape, generator=generator, dtype=sizes.dtype)
    frequencies = inverse_frequencies(model.attention).to(device)
    rope = rope_tables(frequencies, tokens.shape[1], table_scale(model.attention), sizes.dtype)
    inputs = [x.requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]

    def step() -> Sequence[Tensor]:
        # Hashing belongs to the step; a loader may do it ahead of time.
        out = block(x, transformer.hash_ids(tokens).get(1), rope, None)
        return torch.autograd.grad(out, inputs, cotangent, allow_unused=True)

    return Run(step)
