"""Backward kernels: through the convolution to the value first, then through the gates to hidden states and keys.

What reaches a gate is a sum over all columns, so the later kernels start from sums that the first one leaves, one for
each segment of columns. Nothing is added atomically. Legend of tiles: G streams (padded to a power of two), C chains,
T tokens, D columns, S segments (padded likewise).
"""

# Tuples grow in loops that the compiler unrolls.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from engram.kernels.engram_gate_conv.triton_forward import live_value, normed_value


@triton.jit
def value_backward_kernel(
    grad,
    keys_and_value,
    alive,
    taps,
    gates,
    scales,
    grad_value,
    direct_sums,
    conv_sums,
    tap_sums,
    num_tokens,
    num_chains,
    chains_per_phase,
    length,
    dilation,
    TAPS: tl.constexpr,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GRAD_COLUMNS: tl.constexpr,
    PADDED_STREAMS: tl.constexpr,
    CHAINS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the value, but for its norm's; per stream <grad, value> and <gradient through the convolution,
    value> over BLOCK columns, [S, G, tokens]; the taps' gradient over CHAINS chains, [groups, K, G, D].

    A chain is STEPS tokens `dilation` apart, walked from the last one. The values that a token's taps read, and the
    tokens that read its value, move by one place with each step: each is loaded once and kept in registers.
    """
    HALO: tl.constexpr = TAPS - 1 if TAPS > 0 else 0
    blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    stream = tl.arange(0, PADDED_STREAMS)
    known_GD = (stream < STREAMS)[:, None] & (column < WIDTH)[None, :]
    channel = stream[:, None] * WIDTH + column[None, :]

    chain = group * CHAINS + tl.arange(0, CHAINS)
    there = chain < num_chains
    phase = chain % dilation
    row = chain // dilation // chains_per_phase
    first = chain // dilation % chains_per_phase * (STEPS * dilation) + phase
    # The walk starts with the tokens that read the chain's last values.
    position = first + (STEPS + HALO - 1) * dilation

    weights = ()
    grad_taps = ()
    reads = ()
    changes = ()
    for tap in tl.static_range(TAPS):
        weights += (tl.load(taps + tap * STREAMS * WIDTH + channel, known_GD, other=0.0)[:, None, :],)
        grad_taps += (tl.zeros((PADDED_STREAMS, CHAINS, BLOCK), tl.float32),)
        if tap > 0:
            # As if one step had been made: the first step brings what its first tap reads.
            source = position - (TAPS - 1 - tap) * dilation
            reads += (
                normed_value(
                    keys_and_value, alive, gates, scales, row * length + source, there & (source < length), stream,
                    column, STREAMS, WIDTH, COLUMNS,
                ),
            )  # fmt: skip
            changes += (tl.zeros((PADDED_STREAMS, CHAINS, BLOCK), tl.float32),)

    for step in range(STEPS + HALO):
        token = row * length + position
        known = there & (position < length)
        at = token[None, :] * STREAMS + stream[:, None]
        grad_at = at[:, :, None] * WIDTH + column[None, None, :]
        g = tl.load(grad + grad_at, known[None, :, None] & known_GD[:, None, :], other=0.0).to(tl.float32)
        # The first steps only prepare what reaches the chain's last values.
        own = known & (step >= HALO)
        own_GC = own[None, :] & (stream < STREAMS)[:, None]
        gate = tl.load(gates + at, own_GC, other=0.0)
        v = live_value(keys_and_value, alive, token, own, column, WIDTH, COLUMNS)[None, :, :]
        total = gate[:, :, None] * g
        sums_at = (block * STREAMS + stream[:, None]) * num_tokens + token[None, :]
        tl.store(direct_sums + sums_at, tl.sum(g * v, 2), own_GC)

        if TAPS > 0:
            source = position - HALO * dilation
            earliest = normed_value(
                keys_and_value, alive, gates, scales, row * length + source,
                there & (source >= 0) & (source < length), stream, column, STREAMS, WIDTH, COLUMNS,
            )  # fmt: skip
            reads = (earliest,) + reads
            conv = tl.zeros((PADDED_STREAMS, CHAINS, BLOCK), tl.float32)
            for tap in tl.static_range(TAPS):
                conv += weights[tap] * reads[tap]
            s = tl.sigmoid(conv)
            changes += (g * s * (1 + conv * (1 - s)),)
            factor = (gate * tl.load(scales + at, own_GC, other=0.0))[:, :, None]
            normed = factor * v
            grad_normed = tl.zeros((PADDED_STREAMS, CHAINS, BLOCK), tl.float32)
            added = ()
            for tap in tl.static_range(TAPS):
                grad_normed += weights[tap] * changes[tap]
                added += (grad_taps[tap] + changes[tap] * normed,)
            grad_taps = added
            tl.store(conv_sums + sums_at, tl.sum(grad_normed * v, 2), own_GC)
            total += factor * grad_normed
            reads = reads[:-1]
            changes = changes[1:]

        # Selected: a dead token's gradient is 0 whatever reaches it.
        total = tl.where((gate != 0)[:, :, None], total, 0.0)
        summed = tl.sum(total, 0).to(grad_value.dtype.element_ty)
        stored = own[:, None] & (column < WIDTH)[None, :]
        tl.store(grad_value + token[:, None] * GRAD_COLUMNS + column[None, :], summed, stored)
        position -= dilation

    for tap in tl.static_range(TAPS):
        tap_sum = tap_sums + (group * TAPS + tap) * STREAMS * WIDTH + channel
        tl.store(tap_sum, tl.sum(grad_taps[tap], 1), known_GD)


@triton.jit
def norm_backward_kernel(
    grad_value,
    keys_and_value,
    alive,
    gates,
    scales,
    conv_sums,
    grad_keys_and_value,
    num_tokens,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_STREAMS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the value, with what the norms of its gated copies take off."""
    blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    stream = tl.arange(0, PADDED_STREAMS)
    segment = tl.arange(0, PADDED_SEGMENTS).to(tl.int64)
    live = tl.load(alive + token, token < num_tokens, other=0) != 0
    live_GT = live[None, :] & (stream < STREAMS)[:, None]
    at = token[None, :] * STREAMS + stream[:, None]
    factor = tl.load(gates + at, live_GT, other=0.0) * tl.load(scales + at, live_GT, other=0.0)
    sums_at = (segment[:, None, None] * STREAMS + stream[None, :, None]) * num_tokens + token[None, None, :]
    sums_known = (segment < SEGMENTS)[:, None, None] & live_GT[None, :, :]
    conv = tl.sum(tl.load(conv_sums + sums_at, sums_known, other=0.0), 0)
    shrink = tl.sum(factor * factor * factor * conv, 0) / WIDTH

    stored = (token < num_tokens)[:, None] & (column < WIDTH)[None, :]
    value_at = token[:, None] * COLUMNS + (COLUMNS - WIDTH) + column[None, :]
    v = tl.load(keys_and_value + value_at, stored & live[:, None], other=0.0).to(tl.float32)
    total = tl.load(grad_value + token[:, None] * WIDTH + column[None, :], stored, other=0.0)
    result = total - shrink[:, None] * v
    tl.store(grad_keys_and_value + value_at, result.to(grad_keys_and_value.dtype.element_ty), stored)


@triton.jit
def gate_backward_kernel(
    hidden,
    keys_and_value,
    alive,
    gain,
    gates,
    scores,
    scales,
    direct_sums,
    conv_sums,
    grad_hidden,
    grad_keys_and_value,
    gain_sums,
    num_tokens,
    conv_eps,
    SIGNED_SQRT: tl.constexpr,
    CONV: tl.constexpr,
    STREAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES times TOKENS tokens, BLOCK columns of one stream: the gradients of hidden states and keys, and the gain's
    over these tokens, [chunks, G, D].

    With x = ir(h) h and y = ir(k) k, dh = ir(h) ds (gain y / sqrt(D) - s x / D), dk alike, dgain = ds x y / sqrt(D).
    """
    blocks: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    stream = tl.program_id(0) // blocks % STREAMS
    chunk = (tl.program_id(0) // (blocks * STREAMS)).to(tl.int64)
    inside = column < WIDTH
    segment = tl.arange(0, PADDED_SEGMENTS).to(tl.int64)
    weight = tl.load(gain + stream * WIDTH + column, inside, other=0.0)[None, :] / tl.sqrt(WIDTH * 1.0)

    grad_gain = tl.zeros((TOKENS, BLOCK), tl.float32)
    for tile in range(TILES):
        token = (chunk * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        live = tl.load(alive + token, token < num_tokens, other=0) != 0
        at = token * STREAMS + stream
        gate = tl.load(gates + at, live, other=0.0)
        score = tl.load(scores + at, live, other=0.0)
        inverse_hidden = tl.load(scores + (token + num_tokens) * STREAMS + stream, live, other=0.0)
        inverse_key = tl.load(scores + (token + 2 * num_tokens) * STREAMS + stream, live, other=0.0)
        sums_at = (segment[:, None] * STREAMS + stream) * num_tokens + token[None, :]
        sums_known = (segment < SEGMENTS)[:, None] & live[None, :]
        change = tl.sum(tl.load(direct_sums + sums_at, sums_known, other=0.0), 0)
        if CONV:
            # rms(v) hardly depends on the size of v: what reaches the gate through it is what eps lets pass.
            scale = tl.load(scales + at, live, other=0.0)
            change += conv_eps * scale * scale * scale * tl.sum(tl.load(conv_sums + sums_at, sums_known, other=0.0), 0)
        change *= gate * (1 - gate)
        if SIGNED_SQRT:
            # Below the floor the gate is constant.
            magnitude = tl.abs(score)
            change = tl.where(magnitude >= 1e-6, change * 0.5 * tl.rsqrt(tl.maximum(magnitude, 1e-6)), 0.0)

        stored = (token < num_tokens)[:, None] & inside[None, :]
        known = stored & live[:, None]
        hidden_at = at[:, None] * WIDTH + column[None, :]
        key_at = token[:, None] * COLUMNS + stream * WIDTH + column[None, :]
        x = tl.load(hidden + hidden_at, known, other=0.0).to(tl.float32) * inverse_hidden[:, None]
        y = tl.load(keys_and_value + key_at, known, other=0.0).to(tl.float32) * inverse_key[:, None]
        shrink = (score / WIDTH)[:, None]
        dh = (change * inverse_hidden)[:, None] * (weight * y - shrink * x)
        dk = (change * inverse_key)[:, None] * (weight * x - shrink * y)
        tl.store(grad_hidden + hidden_at, dh.to(grad_hidden.dtype.element_ty), stored)
        tl.store(grad_keys_and_value + key_at, dk.to(grad_keys_and_value.dtype.element_ty), stored)
        grad_gain += change[:, None] * x * y
    total = tl.sum(grad_gain, 0) / tl.sqrt(WIDTH * 1.0)
    tl.store(gain_sums + (chunk * STREAMS + stream) * WIDTH + column, total, inside)
