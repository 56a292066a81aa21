"""Forward kernels: gates of all tokens first, then the convolution, which needs those of earlier tokens.

All streams stand side by side in a program, so the value that they share is read once. Tokens count through the batch,
[0, B * length). Legend of tiles: G streams (padded to a power of two), T tokens, D columns.
"""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(token, stream, column, WIDTH: tl.constexpr, STREAMS: tl.constexpr):
    """Where hidden states [tokens, streams, width] of a tile lie: int64 [G, T, D]."""
    return (token[None, :, None] * STREAMS + stream[:, None, None]) * WIDTH + column[None, None, :]


@triton.jit
def live_value(keys_and_value, alive, token, known, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Values of tokens [T] in some columns, float32 [T, D]; 0 where there is no token or a dead one."""
    live = tl.load(alive + token, known, other=0) != 0
    at = token[:, None] * COLUMNS + (COLUMNS - WIDTH) + column[None, :]
    return tl.load(keys_and_value + at, live[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def normed_value(
    keys_and_value,
    alive,
    gates,
    scales,
    token,
    known,
    stream,
    column,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Normed gated values of tokens [T] without the norm's gain, [G, T, D]; 0 where there is no token or a dead one."""
    known_GT = known[None, :] & (stream < STREAMS)[:, None]
    at = token[None, :] * STREAMS + stream[:, None]
    factor = tl.load(gates + at, known_GT, other=0.0) * tl.load(scales + at, known_GT, other=0.0)
    return factor[:, :, None] * live_value(keys_and_value, alive, token, known, column, WIDTH, COLUMNS)[None, :, :]


@triton.jit
def gate_kernel(
    hidden,
    keys_and_value,
    alive,
    gain,
    out,
    gates,
    scores,
    scales,
    num_tokens,
    eps,
    conv_eps,
    GATE: tl.constexpr,
    CONV: tl.constexpr,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gates, scores and norms of TOKENS tokens; without a convolution also the output."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    stream = tl.arange(0, PADDED_STREAMS)
    live = tl.load(alive + token, token < num_tokens, other=0) != 0
    live_GT = live[None, :] & (stream < STREAMS)[:, None]

    hidden_square = tl.zeros((PADDED_STREAMS, TOKENS, BLOCK), tl.float32)
    key_square = tl.zeros((PADDED_STREAMS, TOKENS, BLOCK), tl.float32)
    dot = tl.zeros((PADDED_STREAMS, TOKENS, BLOCK), tl.float32)
    value_square = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        if GATE is not None:
            known = live_GT[:, :, None] & inside[None, None, :]
            key_at = token[None, :, None] * COLUMNS + stream[:, None, None] * WIDTH + column[None, None, :]
            hidden_at = tile_offsets(token, stream, column, WIDTH, STREAMS)
            h = tl.load(hidden + hidden_at, known, other=0.0).to(tl.float32)
            k = tl.load(keys_and_value + key_at, known, other=0.0).to(tl.float32)
            gain_known = (stream < STREAMS)[:, None] & inside[None, :]
            gain_at = stream[:, None] * WIDTH + column[None, :]
            hidden_square += h * h
            key_square += k * k
            dot += h * k * tl.load(gain + gain_at, gain_known, other=0.0)[:, None, :]
        if CONV:
            v = live_value(keys_and_value, alive, token, live, column, WIDTH, COLUMNS)
            value_square += v * v

    at = token[None, :] * STREAMS + stream[:, None]
    stored = (token < num_tokens)[None, :] & (stream < STREAMS)[:, None]
    gate = live_GT.to(tl.float32)
    if GATE is not None:
        inverse_hidden = tl.rsqrt(tl.sum(hidden_square, 2) / WIDTH + eps)
        inverse_key = tl.rsqrt(tl.sum(key_square, 2) / WIDTH + eps)
        score = tl.sum(dot, 2) * inverse_hidden * inverse_key / tl.sqrt(WIDTH * 1.0)
        tl.store(scores + at, score, stored)
        tl.store(scores + (token + num_tokens)[None, :] * STREAMS + stream[:, None], inverse_hidden, stored)
        tl.store(scores + (token + 2 * num_tokens)[None, :] * STREAMS + stream[:, None], inverse_key, stored)
        if GATE == "signed_sqrt":
            root = tl.sqrt(tl.maximum(tl.abs(score), 1e-6))
            score = tl.where(score < 0, -root, root)
        gate = tl.where(live_GT, tl.sigmoid(score), 0.0)
    tl.store(gates + at, gate, stored)
    if CONV:
        mean_square = tl.sum(value_square, 1) / WIDTH
        tl.store(scales + at, tl.rsqrt(gate * gate * mean_square[None, :] + conv_eps), stored)
    else:
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            v = live_value(keys_and_value, alive, token, live, column, WIDTH, COLUMNS)
            product = gate[:, :, None] * v[None, :, :]
            out_at = tile_offsets(token, stream, column, WIDTH, STREAMS)
            tl.store(out + out_at, product.to(out.dtype.element_ty), stored[:, :, None] & inside[None, None, :])


@triton.jit
def conv_kernel(
    keys_and_value,
    alive,
    taps,
    gates,
    scales,
    out,
    num_tokens,
    length,
    dilation,
    TAPS: tl.constexpr,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The output of TOKENS tokens in BLOCK columns of every stream."""
    blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    stream = tl.arange(0, PADDED_STREAMS)
    position = token % length
    known_GD = (stream < STREAMS)[:, None] & (column < WIDTH)[None, :]
    channel = stream[:, None] * WIDTH + column[None, :]

    conv = tl.zeros((PADDED_STREAMS, TOKENS, BLOCK), tl.float32)
    for tap in tl.static_range(TAPS):
        lag = (TAPS - 1 - tap) * dilation
        known = (token < num_tokens) & (position >= lag)
        weight = tl.load(taps + tap * STREAMS * WIDTH + channel, known_GD, other=0.0)
        conv += weight[:, None, :] * normed_value(
            keys_and_value, alive, gates, scales, token - lag, known, stream, column, STREAMS, WIDTH, COLUMNS
        )

    v = live_value(keys_and_value, alive, token, token < num_tokens, column, WIDTH, COLUMNS)
    stored = (token < num_tokens)[None, :] & (stream < STREAMS)[:, None]
    gate = tl.load(gates + token[None, :] * STREAMS + stream[:, None], stored, other=0.0)
    result = gate[:, :, None] * v[None, :, :] + conv * tl.sigmoid(conv)
    out_at = tile_offsets(token, stream, column, WIDTH, STREAMS)
    tl.store(out + out_at, result.to(out.dtype.element_ty), stored[:, :, None] & known_GD[:, None, :])
