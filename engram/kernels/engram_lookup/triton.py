"""Rows gathered on a GPU, and hash and gather of one memory layer in one launch.

Tables far exceed the reach of the TLB, so few programs stay on the device and walk over the rows, each with a tile of
rows in flight. Rows may lie in device memory or in pinned host memory: the addresses are all that differs.

Letters: B batch, T tokens, N longest n-gram, H heads of one order, C = (N-1)*H columns (padded: CP), D width of a row
(padded: DP), R rows of a tile, K tokens of a block.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.compile_ahead import Build, record
from engram.kernels.ngram_hash.triton import hash_columns, reciprocal

SCALE_BLOCK = tl.constexpr(32)
# 16 values for each thread of four warps are two loads of 16 bytes (bf16); with eight programs that is 32 KB in flight
# on each multiprocessor, about what hides the latency of device memory.
TILE = 2048
PROGRAMS_PER_MULTIPROCESSOR = 8
# Tokens that one program hashes before it gathers their rows.
TOKENS = 16


@triton.jit
def e4m3_to_float(byte):
    """By way of float16, which has the same fraction and more exponent: exact, subnormals too, on every GPU."""
    half = ((byte & 0x80).to(tl.uint16) << 8) | ((byte & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0_to_float(byte):
    """2^(byte - 127); 255 is NaN, 0 a subnormal."""
    bits = tl.where(byte == 0, 0x00400000, byte.to(tl.int32) << 23)
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def copy_rows(
    table_ptr,
    scales_ptr,
    ids_ptr,
    out_ptr,
    row_R,
    count,
    num_rows,
    row_stride,
    scale_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """out[row] = table[ids[row]] for the rows `row_R` below `count`."""
    column_D = tl.arange(0, DP)
    inside_R = row_R < count
    id_R = tl.load(ids_ptr + row_R, mask=inside_R, other=-1)
    known_RD = ((id_R >= 0) & (id_R < num_rows))[:, None] & (column_D < D)[None, :]
    value_RD = tl.load(table_ptr + id_R[:, None] * row_stride + column_D[None, :], mask=known_RD, other=0)
    if HAS_SCALES:
        scale_ptr_RD = scales_ptr + id_R[:, None] * scale_stride + (column_D // SCALE_BLOCK)[None, :]
        value_RD = e4m3_to_float(value_RD) * e8m0_to_float(tl.load(scale_ptr_RD, mask=known_RD, other=127))
    out_ptr_RD = out_ptr + row_R[:, None] * D + column_D[None, :]
    value_RD = value_RD.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr_RD, value_RD, mask=inside_R[:, None] & (column_D < D)[None, :])


@triton.jit
def gather_rows_kernel(
    table_ptr,
    scales_ptr,
    ids_ptr,
    out_ptr,
    count,
    num_rows,
    row_stride,
    scale_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    for _ in range(tl.program_id(0), tl.cdiv(count, R), tl.num_programs(0)):
        copy_rows(
            table_ptr,
            scales_ptr,
            ids_ptr,
            out_ptr,
            row_R,
            count,
            num_rows,
            row_stride,
            scale_stride,
            D,
            DP,
            HAS_SCALES,
        )
        row_R += tl.num_programs(0).to(tl.int64) * R


@triton.jit
def engram_lookup_kernel(
    tokens_ptr,
    documents_ptr,
    map_ptr,
    map_size,
    multipliers_ptr,
    primes_ptr,
    offsets_ptr,
    table_ptr,
    scales_ptr,
    ids_ptr,
    out_ptr,
    size,
    length,
    pad_id,
    num_rows,
    row_stride,
    scale_stride,
    N: tl.constexpr,
    H: tl.constexpr,
    CP: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    STOP_AT_PAD: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    C: tl.constexpr = (N - 1) * H
    column_C = tl.arange(0, CP)
    real_C = column_C < C
    prime_C = tl.load(primes_ptr + column_C, mask=real_C, other=2)
    reciprocal_C = reciprocal(prime_C)
    offset_C = tl.load(offsets_ptr + column_C, mask=real_C, other=0)
    start = tl.program_id(0).to(tl.int64) * K
    for _ in range(tl.program_id(0), tl.cdiv(size, K), tl.num_programs(0)):
        at_K = start + tl.arange(0, K)
        hash_KC, alive_K = hash_columns(
            tokens_ptr,
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
            column_C // H,
            N,
            HAS_DOCUMENTS,
            HAS_MAP,
            STOP_AT_PAD,
        )
        id_KC = tl.where(alive_K[:, None], hash_KC + offset_C[None, :], -1)
        id_ptr_KC = ids_ptr + at_K[:, None] * C + column_C[None, :]
        tl.store(id_ptr_KC, id_KC, mask=(at_K < size)[:, None] & real_C[None, :])
        # The rows are gathered by other threads than those that stored their ids.
        tl.debug_barrier()
        end = tl.minimum(start + K, size) * C
        for first in range(0, K * C, R):
            copy_rows(
                table_ptr,
                scales_ptr,
                ids_ptr,
                out_ptr,
                start * C + first + tl.arange(0, R),
                end,
                num_rows,
                row_stride,
                scale_stride,
                D,
                DP,
                HAS_SCALES,
            )
        start += tl.num_programs(0).to(tl.int64) * K


def gather_rows_triton(table: Tensor, ids: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """Fills `out`."""
    count, (num_rows, width) = ids.numel(), table.shape
    if not count:
        return
    tile = rows_per_tile(width)
    gather_rows_kernel[(_programs(triton.cdiv(count, tile), ids.device),)](
        _bytes(table),
        _bytes(scales),
        ids,
        out,
        count,
        num_rows,
        table.stride(0),
        0 if scales is None else scales.stride(0),
        D=width,
        DP=triton.next_power_of_2(width),
        R=tile,
        HAS_SCALES=scales is not None,
    )


def engram_lookup_triton(
    tokens: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    token_map: Tensor | None,
    table: Tensor,
    scales: Tensor | None,
    ids: Tensor,
    out: Tensor,
    pad_id: int,
    stop_at_pad: bool,
) -> None:
    """Fills `ids` [B, T, C] and `out` [B, T, C*D]."""
    (batch, length), (orders, heads), (num_rows, width) = tokens.shape, primes.shape, table.shape
    if not tokens.numel():
        return
    engram_lookup_kernel[(_programs(triton.cdiv(tokens.numel(), TOKENS), tokens.device),)](
        tokens,
        document_ids,
        token_map,
        0 if token_map is None else len(token_map),
        multipliers,
        primes,
        offsets,
        _bytes(table),
        _bytes(scales),
        ids,
        out,
        batch * length,
        length,
        pad_id,
        num_rows,
        table.stride(0),
        0 if scales is None else scales.stride(0),
        N=orders + 1,
        H=heads,
        CP=triton.next_power_of_2(orders * heads),
        K=TOKENS,
        D=width,
        DP=triton.next_power_of_2(width),
        R=rows_per_tile(width),
        HAS_DOCUMENTS=document_ids is not None,
        HAS_MAP=token_map is not None,
        STOP_AT_PAD=stop_at_pad,
        HAS_SCALES=scales is not None,
    )


def rows_per_tile(width: int) -> int:
    return max(TILE // triton.next_power_of_2(width), 1)


def _programs(tiles: int, device: torch.device) -> int:
    # The interpreter, which runs on CPU, takes its time for each program: two already have to share the tiles.
    return min(tiles, _multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR if device.type == "cuda" else 2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bytes(values: Tensor | None) -> Tensor | None:
    """Eight-bit floats as integers: older GPUs have no such type, and the kernels decode it themselves."""
    return values.view(torch.uint8) if values is not None and values.dtype.itemsize == 1 else values


def builds() -> list[Build]:
    """Longest n-gram, heads, width and documents as in the shipped configs, for each type of table and of output."""
    shapes = {"quickstart": (3, 4, 16, True), "Engram-27B": (3, 8, 80, False), "V4.1": (4, 8, 256, True)}
    float32, bfloat16, e4m3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
    types = [(float32, float32), (float32, bfloat16), (bfloat16, bfloat16)]
    cases = [(name, *pair) for name in shapes for pair in types] + [("V4.1", e4m3, bfloat16)]
    return [build for name, table, out in cases for build in _launches(name, *shapes[name], table, out)]


def _launches(
    name: str, longest: int, heads: int, width: int, documents: bool, table: torch.dtype, out: torch.dtype
) -> list[Build]:
    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    orders, tokens, rows = longest - 1, (2, 4096), 10_000_000
    columns = orders * heads
    recipe = meta(longest), meta(orders, heads), meta(columns), meta(129_280)
    values = meta(rows, width, dtype=table)
    scales = meta(rows, width // 32, dtype=torch.uint8) if table.itemsize == 1 else None
    ids, target = meta(*tokens, columns), meta(*tokens, columns * width, dtype=out)
    documents_BT = meta(*tokens) if documents else None

    def launch() -> None:
        gather_rows_triton(values, ids, scales, target)
        engram_lookup_triton(meta(*tokens), documents_BT, *recipe, values, scales, ids, target, 2, False)

    return record(f"{name} {table} to {out}".replace("torch.", ""), launch)
