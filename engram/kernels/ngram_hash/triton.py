"""N-gram hashing on a GPU: all layers in one launch, divisions by multiplication with reciprocals.

Letters: B batch, T tokens, L memory layers, N longest n-gram, H heads of one order, C = (N-1)*H columns (padded: CP),
V token ids, K tokens of one block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.compile_ahead import Build, record

# Programs walk over blocks, so that each computes its reciprocals once.
PROGRAMS_PER_LAYER = 512


@triton.jit
def reciprocal(prime):
    """floor((2^64 - 1) / p): the only division of a program."""
    return 0xFFFFFFFFFFFFFFFF // prime.to(tl.uint64)


@triton.jit
def remainder(number, prime, reciprocal):
    """number mod prime for 0 <= number < 2^63: the high product is the quotient or one less."""
    number, prime = number.to(tl.uint64), prime.to(tl.uint64)
    rest = number - tl.umulhi(number, reciprocal) * prime
    return tl.where(rest >= prime, rest - prime, rest).to(tl.int64)


@triton.jit
def key_at(ids_ptr, map_ptr, map_size, at_K, inside_K, HAS_MAP: tl.constexpr):
    """The ids that are hashed; -1 for dead ones, those beyond the map and those not `inside`."""
    key_K = tl.load(ids_ptr + at_K, mask=inside_K, other=-1)
    if HAS_MAP:
        known_K = (key_K >= 0) & (key_K < map_size)
        key_K = tl.load(map_ptr + key_K, mask=known_K, other=-1)
    return key_K


@triton.jit
def hash_columns(
    ids_ptr,
    documents_ptr,
    map_ptr,
    map_size,
    multipliers_ptr,
    at_K,
    size,
    length,
    pad_id,
    prime_C,
    reciprocal_C,
    order_C,
    N: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    STOP_AT_PAD: tl.constexpr,
):
    """Hash ids [K, CP] without offsets of the tokens at flat positions `at_K`, and which of them are alive [K]."""
    inside_K = at_K < size
    position_K = at_K % length
    key_K = key_at(ids_ptr, map_ptr, map_size, at_K, inside_K, HAS_MAP)
    alive_K = key_K >= 0
    if HAS_DOCUMENTS:
        document_K = tl.load(documents_ptr + at_K, mask=inside_K, other=0)
    mix_K = key_K * tl.load(multipliers_ptr)
    mix_KC = tl.zeros((at_K.shape[0], order_C.shape[0]), tl.int64)
    open_K = inside_K
    for shift in tl.static_range(1, N):
        # Positions before the start read as dead tokens, and a dead token is an obstacle.
        before_K = inside_K & (position_K >= shift)
        older_K = key_at(ids_ptr, map_ptr, map_size, at_K - shift, before_K, HAS_MAP)
        open_K = open_K & (older_K >= 0)
        if HAS_DOCUMENTS:
            open_K = open_K & (tl.load(documents_ptr + at_K - shift, mask=before_K, other=0) == document_K)
        if STOP_AT_PAD:
            open_K = open_K & (older_K != pad_id)
        mix_K = mix_K ^ (tl.where(open_K, older_K, pad_id) * tl.load(multipliers_ptr + shift))
        mix_KC = tl.where((order_C == shift - 1)[None, :], mix_K[:, None], mix_KC)
    return remainder(mix_KC, prime_C[None, :], reciprocal_C[None, :]), alive_K


@triton.jit
def ngram_hash_kernel(
    ids_ptr,
    documents_ptr,
    map_ptr,
    map_size,
    multipliers_ptr,
    primes_ptr,
    offsets_ptr,
    out_ptr,
    size,
    length,
    pad_id,
    N: tl.constexpr,
    H: tl.constexpr,
    CP: tl.constexpr,
    K: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    STOP_AT_PAD: tl.constexpr,
):
    C: tl.constexpr = (N - 1) * H
    layer = tl.program_id(1).to(tl.int64)
    column_C = tl.arange(0, CP)
    real_C = column_C < C
    prime_C = tl.load(primes_ptr + layer * C + column_C, mask=real_C, other=2)
    reciprocal_C = reciprocal(prime_C)
    offset_C = tl.zeros((CP,), tl.int64)
    if HAS_OFFSETS:
        offset_C = tl.load(offsets_ptr + layer * C + column_C, mask=real_C, other=0)
    at_K = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    for _ in range(tl.program_id(0), tl.cdiv(size, K), tl.num_programs(0)):
        hash_KC, alive_K = hash_columns(
            ids_ptr,
            documents_ptr,
            map_ptr,
            map_size,
            multipliers_ptr + layer * N,
            at_K,
            size,
            length,
            pad_id,
            prime_C,
            reciprocal_C,
            column_C // H,
            N,
            HAS_DOCUMENTS,
            HAS_MAP,
            STOP_AT_PAD,
        )
        out_KC = tl.where(alive_K[:, None], hash_KC + offset_C[None, :], -1)
        row_K = layer * size + at_K
        tl.store(
            out_ptr + row_K[:, None] * C + column_C[None, :], out_KC, mask=(at_K < size)[:, None] & real_C[None, :]
        )
        at_K += tl.num_programs(0).to(tl.int64) * K


def tokens_per_block(columns: int) -> int:
    """A thread of the four warps holds four hash ids, few enough for registers and enough to hide latency."""
    return max(512 // triton.next_power_of_2(columns), 1)


def ngram_hash_triton(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    token_map: Tensor | None,
    pad_id: int,
    stop_at_pad: bool,
) -> Tensor:
    (layers, orders, heads), (batch, length) = primes.shape, ids.shape
    columns, size = orders * heads, batch * length
    out = torch.empty(layers, batch, length, columns, dtype=torch.int64, device=ids.device)
    if not size:
        return out
    block = tokens_per_block(columns)
    # The interpreter, which runs on CPU, takes its time for each program: two already have to share the blocks.
    programs = min(triton.cdiv(size, block), PROGRAMS_PER_LAYER if ids.is_cuda else 2)
    ngram_hash_kernel[programs, layers](
        ids,
        document_ids,
        token_map,
        0 if token_map is None else len(token_map),
        multipliers,
        primes,
        offsets,
        out,
        size,
        length,
        pad_id,
        N=orders + 1,
        H=heads,
        CP=triton.next_power_of_2(columns),
        K=block,
        HAS_DOCUMENTS=document_ids is not None,
        HAS_MAP=token_map is not None,
        HAS_OFFSETS=offsets is not None,
        STOP_AT_PAD=stop_at_pad,
    )
    return out


def builds() -> list[Build]:
    """Orders, heads, documents and look-back as in the shipped configs."""
    recipes = {
        "quickstart": (3, 4, True, False),
        "Engram-27B": (3, 8, False, False),
        "V4.1": (4, 8, True, False),
        "stop at pad": (3, 8, False, True),
    }
    return [build for label, recipe in recipes.items() for build in _launches(label, *recipe)]


def _launches(label: str, longest: int, heads: int, documents: bool, stop_at_pad: bool) -> list[Build]:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    orders, tokens, vocabulary = longest - 1, (2, 4096), 129_280
    recipe = meta(1, longest), meta(1, orders, heads), meta(1, orders * heads)
    inputs = meta(*tokens), meta(*tokens) if documents else None, *recipe, meta(vocabulary)
    return record(label, lambda: ngram_hash_triton(*inputs, pad_id=2, stop_at_pad=stop_at_pad))
