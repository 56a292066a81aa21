"""Contests of the memory module, of its gate and convolution, and of hyper-connections: what works on streams.

Legend: B batch, T tokens, G streams, D hidden size, K taps.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.contest import Contender, Contest, Run
from benchmarks.kernel_inputs import Sizes, normal, short, tiled_rows, zipf_tokens
from benchmarks.kernel_peers import demo_of, liger_connection
from benchmarks.memory_contests import COPY, LAYER, VOCABULARY, copy_contender, on_gpu
from benchmarks.passes import BACKWARD, BOTH, FORWARD, Operation, contests
from benchmarks.targets import Bandwidth, Speedup
from engram.config import ConvConfig, MemoryConfig
from engram.kernels.engram_gate_conv import engram_gate_conv, engram_gate_conv_ref
from engram.kernels.mhc_pre_post import mhc_post, mhc_post_ref, mhc_pre_carry, mhc_pre_ref
from engram.memory.engram import Engram
from engram.memory.hashing import NgramHash
from engram.memory.vocabulary import VocabularyMap

TAPS, DILATION = 4, 3
SINKHORN_STEPS = 20
DEMO = "the demo, float32"
# The worst of millions of elements; a wrong one is off by 1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
# Scores of the gate lie around here. Next to 0 the signed root is so steep that rounding alone changes gradients.
SCORE = 5.0


def gates_and_convs(sizes: Sizes, device: str) -> Iterator[Contest]:
    generator = torch.Generator(device).manual_seed(3)
    shape, width, streams = sizes.module_tokens, sizes.module_hidden, sizes.streams
    hidden = (normal(*shape, streams, width, generator=generator) + alike(width)).to(sizes.dtype)
    keys_and_value = (normal(*shape, (streams + 1) * width, generator=generator) + alike(width)).to(sizes.dtype)
    sizes_of_parameters = ((streams, width), (streams * width, 1, TAPS), (streams, width))
    parameters = [normal(*size, generator=generator).mul_(0.1).add_(1) for size in sizes_of_parameters]
    alive_BT = torch.rand(shape, generator=generator, device=device) > 0.01
    settings = dict(gate="signed_sqrt", dilation=DILATION, eps=1e-6, conv_eps=1e-5)

    def plain(hidden: Tensor, keys_and_value: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        return engram_gate_conv_ref(hidden, keys_and_value, alive_BT, *parameters, **settings)[:1]

    def ours(hidden: Tensor, keys_and_value: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        return engram_gate_conv(hidden, keys_and_value, alive_BT, *parameters, **settings)[:1]

    # Bytes of one hidden vector in every token. Forward reads streams, keys and the value and writes the streams.
    unit = keys_and_value.numel() // (streams + 1) * hidden.element_size()
    elements = {FORWARD: 3 * streams + 1, BACKWARD: 5 * streams + 2, BOTH: 8 * streams + 3}
    operation = Operation(
        op="gate_conv",
        title=f"{streams_title(hidden)}, {TAPS} taps",
        reference=plain,
        inputs=[tensor.requires_grad_() for tensor in (hidden, keys_and_value, *parameters)],
        cotangents=[normal(*hidden.shape, generator=generator, dtype=sizes.dtype)],
        ways={"torch, eager": lambda: plain, "torch.compile": lambda: torch.compile(plain), "ours": lambda: ours},
        tolerance=TOLERANCE[sizes.dtype],
        ideal_bytes={way: unit * count for way, count in elements.items()},
    )
    targets = {
        FORWARD: on_gpu(device, Bandwidth("ours", COPY, 0.85)),
        BACKWARD: on_gpu(device, Bandwidth("ours", COPY, 0.75)),
        BOTH: on_gpu(device, Speedup("ours", ["torch.compile"], 2.5)),
    }
    yield from contests(operation, sizes.passes, copy_contender(device, sizes), targets)


def connections(sizes: Sizes, device: str) -> Iterator[Contest]:
    """Read and write of one sublayer, whose output `y` is given."""
    generator = torch.Generator(device).manual_seed(4)
    streams, width = sizes.streams, sizes.module_hidden
    outputs = 2 * streams + streams**2
    x = normal(*sizes.module_tokens, streams, width, generator=generator, dtype=sizes.dtype)
    y = normal(*sizes.module_tokens, width, generator=generator, dtype=sizes.dtype)
    weight = normal(outputs, streams * width, generator=generator).mul_((streams * width) ** -0.5)
    scale, bias = torch.full((3,), 0.5, device=device), normal(outputs, generator=generator)
    eps = 1e-6

    def plain(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Sequence[Tensor]:
        u, h_post, h_res = mhc_pre_ref(x, weight, scale, bias, steps=SINKHORN_STEPS, eps=eps)
        return u, mhc_post_ref(x, y, h_post, h_res)

    def ours(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Sequence[Tensor]:
        u, h_post, h_res, x = mhc_pre_carry(x, weight, scale, bias, steps=SINKHORN_STEPS, eps=eps)
        return u, mhc_post(x, y, h_post, h_res)

    unit = y.numel() * y.element_size()
    # Two operations, since a sublayer lies between them: each reads the streams.
    elements = {FORWARD: 3 * streams + 2, BACKWARD: 5 * streams + 3, BOTH: 8 * streams + 5}
    ways = {
        "torch, eager": lambda: plain,
        "torch.compile": lambda: torch.compile(plain),
        **({"Liger": lambda: liger_connection(SINKHORN_STEPS, eps)} if device == "cuda" else {}),
        "ours": lambda: ours,
    }
    operation = Operation(
        op="mhc",
        title=f"{streams_title(x)}, {SINKHORN_STEPS} Sinkhorn steps, read and write of a sublayer",
        reference=plain,
        inputs=[tensor.requires_grad_() for tensor in (x, y, weight, scale, bias)],
        cotangents=[normal(*tensor.shape, generator=generator, dtype=sizes.dtype) for tensor in (y, x)],
        ways=ways,
        tolerance=TOLERANCE[sizes.dtype],
        ideal_bytes={way: unit * count for way, count in elements.items()},
    )
    targets = {
        FORWARD: on_gpu(device, Bandwidth("ours", COPY, 0.8)),
        BACKWARD: on_gpu(device, Bandwidth("ours", COPY, 0.7)),
        BOTH: on_gpu(device, Speedup("ours", ["Liger"], 2)),
    }
    yield from contests(operation, sizes.passes, copy_contender(device, sizes), targets)


def modules(sizes: Sizes, device: str) -> Iterator[Contest]:
    """Tokens and streams to what memory adds, and the gradients of all that is learned, the table's rows included."""
    generator = torch.Generator(device).manual_seed(9)
    config = MemoryConfig(
        layer_ids=(LAYER,),
        max_ngram_size=3,
        num_heads=8,
        head_dim=sizes.module_dim,
        rows_per_head=sizes.rows_per_head,
        look_back="sequence",
        # As in the demo.
        projection_bias=True,
        norm_eps=torch.finfo(torch.float32).eps,
        conv=ConvConfig(kernel_size=TAPS, dilation=DILATION, zero_init=False),
    )
    hasher = NgramHash.from_config(config, VocabularyMap.identity(VOCABULARY), config.layer_ids)
    table = nn.Parameter(tiled_rows(hasher.num_rows[LAYER], config.head_dim, torch.float32, generator))
    module = Engram(config, layer_id=LAYER, hidden_size=sizes.module_hidden, hc_mult=sizes.streams, num_rows=1)
    module.to(device).embed.weight = table
    tokens_BT = zipf_tokens(sizes.module_tokens, VOCABULARY, generator)
    hidden = normal(*tokens_BT.shape, sizes.streams, sizes.module_hidden, generator=generator)
    hidden += alike(sizes.module_hidden)
    nn.init.constant_(module.wkv.bias, alike(sizes.module_hidden))
    cotangent = normal(*hidden.shape, generator=generator)

    def run(way: Callable[[Tensor], Tensor], dtype: torch.dtype, learned: Sequence[Tensor]) -> Run:
        """The output and the gradient of the streams are checked; the others are computed."""
        x, dout = hidden.to(dtype).requires_grad_(), cotangent.to(dtype)

        def step() -> Sequence[Tensor]:
            out = way(x)
            return [out, torch.autograd.grad(out, [x, *learned], dout)[0]]

        return Run(step)

    def reference(x: Tensor) -> Tensor:
        """In plain torch, part by part; the table's gradient is none of what is compared."""
        rows = table.detach()[hasher(tokens_BT)[LAYER]].flatten(2)
        keys_and_value = module.wkv(rows)
        alive = torch.ones_like(tokens_BT, dtype=torch.bool)
        conv = module.conv
        assert conv is not None
        settings = dict(gate=config.gate, dilation=DILATION, eps=config.norm_eps, conv_eps=config.conv_norm_eps)
        gain = module.q_weight * module.k_weight
        return engram_gate_conv_ref(x, keys_and_value, alive, gain, conv.weight, module.conv_norm, **settings)[0]

    def ours(dtype: torch.dtype, compiled: bool) -> Run:
        fuse = torch.compile(module.fuse) if compiled else module.fuse

        def forward(x: Tensor) -> Tensor:
            ids = hasher(tokens_BT)[LAYER]
            return fuse(x, module.embed(ids, x.dtype), (ids >= 0).any(-1))

        return run(forward, dtype, list(module.parameters()))

    def demo(sparse: bool) -> Run:
        theirs = demo_of(module, hasher, sparse=sparse)
        return run(lambda x: theirs(x, tokens_BT), torch.float32, list(theirs.parameters()))

    contenders = [
        Contender(DEMO, lambda: demo(sparse=False), TOLERANCE[torch.float32]),
        Contender(f"{DEMO}, sparse gradient", lambda: demo(sparse=True), TOLERANCE[torch.float32]),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for how, compiled in (("", False), (", compiled", True)):
            build = functools.partial(ours, dtype, compiled)
            contenders.append(Contender(f"ours, {short(dtype)}{how}", build, TOLERANCE[dtype]))
    yield Contest(
        "engram",
        f"engram, the module, {BOTH}: {streams_title(hidden)}, table {table.shape[0]:,} x {table.shape[1]}",
        run(reference, torch.float32, []).step,
        contenders,
        [Speedup(f"ours, {dtype}", [DEMO], 8) for dtype in ("float32", "bfloat16")] if device == "cpu" else [],
    )


def alike(width: int) -> float:
    """What to add to normal numbers a, b of this width for <a, b> sqrt(width) / (|a| |b|) to be SCORE on average."""
    cosine = min(SCORE * width**-0.5, 0.9)
    return (cosine / (1 - cosine)) ** 0.5


def streams_title(x_BTGD: Tensor) -> str:
    batch, length, streams, width = x_BTGD.shape
    return f"{batch * length:,} tokens, {streams} streams x {width}, {short(x_BTGD.dtype)}"
