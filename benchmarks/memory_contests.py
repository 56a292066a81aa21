"""Contests of the memory's kernels: hash, gather, look-up, table update.

Legend: B batch, T tokens, C hash columns, N longest n-gram, O = N - 1 orders, H heads, R rows, U ids, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import Contender, Contest, Run
from benchmarks.kernel_inputs import Sizes, eighths, large_empty, short, tiled_rows, zipf_ids, zipf_tokens
from benchmarks.kernel_peers import (
    ArrayHash,
    dense_adam,
    fbgemm_rowwise_adagrad,
    numba_hash,
    numpy_hash,
    sparse_adam,
)
from benchmarks.targets import Bandwidth, Speedup, Target
from engram.kernels.engram_lookup import engram_lookup, gather_rows
from engram.kernels.ngram_hash import ngram_hash
from engram.kernels.ngram_hash.reference import ngram_hash_ref
from engram.kernels.table_update import RowPlan, plan_rows, row_adam_, rowwise_adagrad_, sum_rows
from engram.memory.hashing import NgramHash

LAYER = 1
PAD = 2
# DeepSeek's compressed vocabulary.
VOCABULARY = 99_092
# A step as large as a weight, so that the check sees a wrong step.
LR, EPS = 0.5, 1e-8
COPY = "copy_"
# Peers sort inside their update; ids are known before, so that a loader can build the plan.
OURS = INSIDE, AHEAD = ("ours, plan inside", "ours, plan ahead")
# Plan, sums and update one after the other, as in training, which clips by the norm of the sums.
APART = "ours, sums apart"


def hashes(sizes: Sizes, device: str) -> Iterator[Contest]:
    tokens_BT, multipliers, primes, offsets, _ = hash_inputs(sizes, device)
    inputs = (tokens_BT, None, multipliers[None], primes[None], offsets[None])
    options = dict(pad_id=PAD, stop_at_pad=False)

    def reference() -> list[Tensor]:
        return [ngram_hash_ref(*inputs, **options)[0]]

    def of_arrays(kernel: ArrayHash) -> Run:
        arrays = [tensor.numpy() for tensor in (tokens_BT, multipliers, primes, offsets)]
        return Run(lambda: [torch.from_numpy(kernel(*arrays, PAD))])

    on_arrays = [
        Contender("NumPy, as the demo", lambda: of_arrays(numpy_hash), 0),
        Contender("numba, %", lambda: of_arrays(numba_hash()), 0),
    ]
    yield Contest(
        "hash",
        f"hash: {tokens_BT.numel():,} compressed ids x {primes.numel()} heads, with offsets",
        reference,
        [
            *(on_arrays if device == "cpu" else []),
            Contender("torch, eager", lambda: Run(reference), 0),
            Contender("ours", lambda: Run(lambda: [ngram_hash(*inputs, **options)[0]]), 0),
        ],
        [
            Speedup("ours", ["NumPy, as the demo"], 20),
            Speedup("ours", ["torch, eager"], 6),
            Speedup("ours", ["numba, %"], 3),
        ]
        if device == "cpu"
        else [],
    )


def gathers(sizes: Sizes, device: str) -> Iterator[Contest]:
    for dim in sizes.gather_dims:
        generator = torch.Generator(device).manual_seed(dim)
        table_RD = tiled_rows(sizes.gather_rows, dim, sizes.dtype, generator)
        ids_U = zipf_ids(sizes.gather_ids, sizes.gather_rows, sizes.gather_unique, generator)
        yield gather(table_RD, ids_U, device)


def gather(table_RD: Tensor, ids_U: Tensor, device: str) -> Contest:
    count, dim = len(ids_U), table_RD.shape[1]
    # As the module asks: 16 rows of a token beside each other.
    ids_TC = ids_U.view(-1, 16)
    out, source = (large_empty(count, dim, table_RD.dtype, table_RD.device).zero_() for _ in range(2))
    out_TM = out.view(len(ids_TC), -1)
    # A row read and a row written for each id, as a copy of the output.
    moved = 2 * out.numel() * out.element_size()
    peers = {
        "F.embedding": lambda: [F.embedding(ids_U, table_RD)],
        "index_select": lambda: [table_RD.index_select(0, ids_U)],
        "index_select(out=)": lambda: [torch.index_select(table_RD, 0, ids_U, out=out)],
    }
    return Contest(
        "gather",
        f"gather, rows of {dim}: {count:,} Zipf ids ({len(ids_U.unique()) / count:.0%} distinct) of {len(table_RD):,} "
        f"rows, {short(table_RD.dtype)}",
        peers["index_select"],
        [
            *(Contender(name, lambda step=step: Run(step), 0, moved) for name, step in peers.items()),
            Contender(COPY, lambda: Run(lambda: [out.copy_(source)]), None, moved),
            Contender("ours", lambda: Run(lambda: [gather_rows(table_RD, ids_TC).view(-1, dim)]), 0, moved),
            Contender(
                "ours, out=", lambda: Run(lambda: [gather_rows(table_RD, ids_TC, out=out_TM).view(-1, dim)]), 0, moved
            ),
        ],
        [
            Speedup("ours", ["F.embedding"], 8),
            # With an output that is there already, as the best of torch's calls and the copy have it.
            Speedup("ours, out=", ["index_select", "index_select(out=)"], 1.3),
            Bandwidth("ours, out=", COPY, 0.8),
        ]
        if device == "cpu"
        else [],
    )


def lookups(sizes: Sizes, device: str) -> Iterator[Contest]:
    tokens_BT, multipliers, primes, offsets, rows = hash_inputs(sizes, device)
    dim = sizes.gather_dims[-1]
    table_RD = tiled_rows(rows, dim, sizes.dtype, torch.Generator(device).manual_seed(0))
    options = dict(pad_id=PAD, stop_at_pad=False)

    def hash_then_select() -> list[Tensor]:
        ids = ngram_hash(tokens_BT, None, multipliers[None], primes[None], offsets[None], **options)[0]
        return [table_RD.index_select(0, ids.flatten()).view(*tokens_BT.shape, -1), ids]

    ids = ngram_hash_ref(tokens_BT, None, multipliers[None], primes[None], offsets[None], **options)[0]
    distinct = len(ids.unique())
    row_bytes = dim * table_RD.element_size()
    yield Contest(
        "lookup",
        f"lookup: hash and gather of {ids.numel():,} rows x {dim} ({distinct / ids.numel():.0%} distinct), "
        f"{short(sizes.dtype)}",
        lambda: [table_RD[ids].flatten(2), ids],
        [
            copy_contender(device, sizes),
            Contender("hash, then index_select", lambda: Run(hash_then_select), 0),
            Contender(
                "ours",
                lambda: Run(lambda: engram_lookup(tokens_BT, None, multipliers, primes, offsets, table_RD, **options)),
                0,
                tokens_BT.numel() * 8 + (distinct + ids.numel()) * row_bytes,
            ),
        ],
        on_gpu(device, Bandwidth("ours", COPY, 0.8), Speedup("ours", ["hash, then index_select"], 2)),
    )


def table_updates(sizes: Sizes, device: str) -> Iterator[Contest]:
    generator = torch.Generator(device).manual_seed(1)
    table_RD = tiled_rows(sizes.update_rows, sizes.update_dim, torch.float32, generator)
    ids_U = zipf_ids(sizes.update_ids, sizes.update_rows, sizes.update_unique, generator)
    gradient_UD = eighths(*ids_U.shape, sizes.update_dim, generator=generator)
    distinct = len(ids_U.unique())
    share = f"{distinct / len(ids_U):.0%} distinct"
    title = f"{len(ids_U):,} ids x {sizes.update_dim} float32 ({share}), {len(table_RD):,} rows"

    def summed() -> Tensor:
        return torch.zeros_like(table_RD).index_add_(0, ids_U, gradient_UD)

    def first_adam_step() -> list[Tensor]:
        """From zero moments, both corrections cancel: w - lr g / (|g| + eps)."""
        gradient_RD = summed()
        return [table_RD - LR * gradient_RD / (gradient_RD.abs() + EPS)]

    def first_adagrad_step() -> list[Tensor]:
        gradient_RD = summed()
        root_R1 = gradient_RD.square().mean(1, keepdim=True).sqrt()
        return [table_RD - LR * gradient_RD / (root_R1 + EPS)]

    def summed_rows(way: str, plan: RowPlan | None) -> tuple[Tensor, RowPlan]:
        plan = plan or plan_rows(ids_U)
        return (sum_rows(gradient_UD, plan), RowPlan.of_sums(plan.rows)) if way == APART else (gradient_UD, plan)

    def adam_run(way: str) -> Run:
        table, first, second = table_RD.clone(), torch.zeros_like(table_RD), torch.zeros_like(table_RD)
        row_step = torch.zeros(len(table), dtype=torch.int32, device=device)
        plan = plan_rows(ids_U) if way == AHEAD else None

        def step() -> list[Tensor]:
            row_adam_(
                table,
                first,
                second,
                row_step,
                *summed_rows(way, plan),
                lr=LR,
                betas=(0.9, 0.999),
                eps=EPS,
                weight_decay=0.0,
                seed=0,
            )
            return [table]

        return Run(step)

    def adagrad_run(way: str) -> Run:
        table, square_sum = table_RD.clone(), torch.zeros(len(table_RD), device=device)
        plan = plan_rows(ids_U) if way == AHEAD else None

        def step() -> list[Tensor]:
            rowwise_adagrad_(table, square_sum, *summed_rows(way, plan), lr=LR, eps=EPS, weight_decay=0.0, seed=0)
            return [table]

        return Run(step)

    gradient_bytes = gradient_UD.numel() * 4 + ids_U.numel() * 8
    # Weight and two moments of every distinct row, read and written; for Adagrad the weight and one number.
    adam_bytes = gradient_bytes + distinct * (sizes.update_dim * 3 + 1) * 8
    adagrad_bytes = gradient_bytes + distinct * (sizes.update_dim + 1) * 8
    inputs = (table_RD, ids_U, gradient_UD)
    yield Contest(
        "table_update",
        f"table_update, Adam: {title}",
        first_adam_step,
        [
            copy_contender(device, sizes),
            Contender("SparseAdam", lambda: sparse_adam(*inputs, lr=LR, eps=EPS), 1e-5, adam_bytes),
            Contender("dense AdamW, fused", lambda: dense_adam(*inputs, lr=LR, eps=EPS), 1e-5, adam_bytes),
            *(Contender(way, lambda way=way: adam_run(way), 1e-5, adam_bytes) for way in (*OURS, APART)),
        ],
        [Speedup(ours, ["SparseAdam"], 4) for ours in OURS]
        if device == "cpu"
        else on_gpu(device, Bandwidth(AHEAD, COPY, 0.6)),
    )
    fbgemm = Contender(
        "FBGEMM, its forward untimed", lambda: fbgemm_rowwise_adagrad(*inputs, lr=LR, eps=EPS), 1e-5, adagrad_bytes
    )
    yield Contest(
        "table_update",
        f"table_update, row-wise Adagrad: {title}",
        first_adagrad_step,
        [
            copy_contender(device, sizes),
            *([fbgemm] if device == "cpu" else []),
            *(Contender(way, lambda way=way: adagrad_run(way), 1e-5, adagrad_bytes) for way in (*OURS, APART)),
        ],
        [Speedup(ours, [fbgemm.name], 4) for ours in OURS]
        if device == "cpu"
        else on_gpu(device, Bandwidth(AHEAD, COPY, 0.6)),
    )


def hash_inputs(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """tokens [B, T], multipliers [N], primes [O, H], offsets [C] of one layer, and the rows of its table."""
    hasher = NgramHash(
        vocabulary_size=VOCABULARY,
        layer_ids=[LAYER],
        max_ngram_size=3,
        num_heads=8,
        rows_per_head=[sizes.rows_per_head] * 2,
        pad_id=PAD,
        look_back="sequence",
    )
    constants = (hasher.multipliers[LAYER], hasher.vocab_sizes[LAYER], hasher.offsets[LAYER])
    multipliers, primes, offsets = (torch.tensor(values, device=device) for values in constants)
    tokens_BT = zipf_tokens(sizes.hash_tokens, VOCABULARY, torch.Generator(device).manual_seed(0))
    return tokens_BT, multipliers, primes, offsets, hasher.num_rows[LAYER]


def copy_contender(device: str, sizes: Sizes) -> Contender:
    """The bandwidth that others are measured by: a copy larger than every cache."""
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Contender(COPY, lambda: Run(lambda: [target.copy_(source)]), None, 2 * len(source))


def on_gpu(device: str, *targets: Target) -> tuple[Target, ...]:
    return targets if device == "cuda" else ()
