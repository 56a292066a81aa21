"""Launches of the Triton kernels: sizes of tiles, buffers, and the sums over tiles in a fixed order."""

import functools
import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from engram.kernels.compile_ahead import Build, record
from engram.kernels.engram_gate_conv.triton_backward import (
    gate_backward_kernel,
    norm_backward_kernel,
    value_backward_kernel,
)
from engram.kernels.engram_gate_conv.triton_forward import conv_kernel, gate_kernel

# Tokens in a chain of the first backward kernel, which reads taps - 1 tokens more; fewer in short rows.
STEPS = 32
# Tiles of tokens that one program of the last backward kernel sums the gain's gradient over; fewer where there are few.
TILES = 32


def _tile(width: int, columns: int, elements: int) -> dict[str, int]:
    """About `elements` in a tile of at most `columns` columns: fewer columns leave room for more tokens."""
    block = min(triton.next_power_of_2(width), columns)
    return dict(TOKENS=max(elements // block, 1), BLOCK=block)


def _shape(hidden: Tensor, keys_and_value: Tensor) -> dict[str, int]:
    streams, width = hidden.shape[-2:]
    padded = triton.next_power_of_2(streams)
    return dict(STREAMS=streams, WIDTH=width, COLUMNS=keys_and_value.shape[-1], PADDED_STREAMS=padded)


def forward_triton(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    out: Tensor,
    gates: Tensor,
    scores: Tensor,
    scales: Tensor,
    gate: str | None,
    dilation: int,
    eps: float,
    conv_eps: float,
) -> None:
    batch, length, _, width = hidden.shape
    num_tokens, shape = batch * length, _shape(hidden, keys_and_value)
    # Four tiles of all streams are held at once: 2048 elements of each take 16 registers of 128 threads.
    tile = _tile(width, 256, 2048 // shape["PADDED_STREAMS"])
    gate_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
        hidden, keys_and_value, alive, gain, out, gates, scores, scales, num_tokens, eps, conv_eps,
        GATE=gate, CONV=taps is not None, **shape, **tile,
    )  # fmt: skip
    if taps is None:
        return
    # Wide enough for whole sectors of memory, long enough that few tokens before the tile are read twice.
    tile = _tile(width, 64, 4096 // shape["PADDED_STREAMS"])
    conv_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]) * triton.cdiv(width, tile["BLOCK"]),)](
        keys_and_value, alive, taps, gates, scales, out, num_tokens, length, dilation,
        TAPS=len(taps), **shape, **tile,
    )  # fmt: skip


def backward_triton(
    grad: Tensor,
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    gates: Tensor,
    scores: Tensor,
    scales: Tensor,
    grad_hidden: Tensor,
    grad_keys_and_value: Tensor,
    grad_gain: Tensor,
    grad_taps: Tensor,
    gate: str | None,
    dilation: int,
    conv_eps: float,
) -> None:
    batch, length, streams, width = hidden.shape
    num_tokens, shape = batch * length, _shape(hidden, keys_and_value)
    buffer: dict[str, Any] = dict(dtype=torch.float32, device=hidden.device)
    # Small tiles: what the taps read of them stays in registers. Without taps, wider ones leave fewer sums.
    block = min(triton.next_power_of_2(width), 256 if taps is None else 64)
    chains = max(512 // (block * shape["PADDED_STREAMS"]), 1)
    # Without taps any token may follow the other.
    dilation = dilation if taps is not None else 1
    steps = min(STEPS, triton.next_power_of_2(triton.cdiv(length, dilation)))
    chains_per_phase = triton.cdiv(length, steps * dilation)
    num_chains = batch * chains_per_phase * dilation
    num_groups, num_segments = triton.cdiv(num_chains, chains), triton.cdiv(width, block)
    segments = dict(SEGMENTS=num_segments, PADDED_SEGMENTS=triton.next_power_of_2(num_segments))
    direct_sums = torch.empty(num_segments, streams, num_tokens, **buffer)
    conv_sums = tap_sums = None
    grad_value = grad_keys_and_value[..., -width:]
    if taps is not None:
        conv_sums = torch.empty_like(direct_sums)
        tap_sums = torch.empty(num_groups, *taps.shape, **buffer)
        grad_value = torch.empty(batch, length, width, **buffer)
    value_backward_kernel[(num_groups * num_segments,)](
        grad, keys_and_value, alive, taps, gates, scales, grad_value, direct_sums, conv_sums, tap_sums,
        num_tokens, num_chains, chains_per_phase, length, dilation,
        TAPS=0 if taps is None else len(taps), GRAD_COLUMNS=grad_value.stride(1), **shape,
        CHAINS=chains, STEPS=steps, BLOCK=block,
    )  # fmt: skip
    if tap_sums is not None:
        torch.sum(tap_sums, 0, out=grad_taps)
        tile = _tile(width, 256, 2048)
        norm_backward_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]) * triton.cdiv(width, tile["BLOCK"]),)](
            grad_value, keys_and_value, alive, gates, scales, conv_sums, grad_keys_and_value, num_tokens,
            **shape, **segments, **tile,
        )  # fmt: skip
    if gain is None:
        return
    tile = _tile(width, 256, 1024)
    tiles = min(TILES, triton.next_power_of_2(triton.cdiv(num_tokens, tile["TOKENS"])))
    num_chunks = triton.cdiv(num_tokens, tile["TOKENS"] * tiles)
    gain_sums = torch.empty(num_chunks, streams, width, **buffer)
    del shape["PADDED_STREAMS"]
    gate_backward_kernel[(num_chunks * streams * triton.cdiv(width, tile["BLOCK"]),)](
        hidden, keys_and_value, alive, gain, gates, scores, scales, direct_sums, conv_sums,
        grad_hidden, grad_keys_and_value, gain_sums, num_tokens, conv_eps,
        SIGNED_SQRT=gate == "signed_sqrt", CONV=taps is not None, **shape, **segments, **tile, TILES=tiles,
    )  # fmt: skip
    torch.sum(gain_sums, 0, out=grad_gain)


def builds() -> list[Build]:
    """Forward and backward, as the shipped configs launch them, in both dtypes."""
    shapes = {
        # Streams, hidden size, taps.
        "quickstart": (4, 128, 4),
        "single fusion": (1, 128, 4),
        "Engram-27B": (4, 2560, 4),
        "V4.1": (4, 5120, 0),
    }
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    found: list[Build] = []
    for (label, shape), (name, dtype) in itertools.product(shapes.items(), dtypes.items()):
        found += record(f"{label} {name}", functools.partial(_launch_both, *shape, dtype))
    return found


def _launch_both(streams: int, width: int, num_taps: int, dtype: torch.dtype) -> None:
    batch, length = 8, 4096
    tokens = (batch, length, streams)
    columns = (streams + 1) * width

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    hidden, keys_and_value = fp32(*tokens, width).to(dtype), fp32(batch, length, columns).to(dtype)
    alive = torch.empty(batch, length, dtype=torch.bool, device="meta")
    gain, taps = fp32(streams, width), fp32(num_taps, streams, width) if num_taps else None
    saved = fp32(*tokens), fp32(3, *tokens), fp32(*tokens)
    inputs = hidden, keys_and_value, alive, gain, taps
    forward_triton(*inputs, hidden, *saved, gate="signed_sqrt", dilation=3, eps=1e-6, conv_eps=1e-5)
    gradients = hidden, keys_and_value, gain, fp32(num_taps, streams, width)
    backward_triton(hidden, *inputs, *saved, *gradients, gate="signed_sqrt", dilation=3, conv_eps=1e-5)
