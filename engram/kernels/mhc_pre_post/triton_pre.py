"""mHC's read (pre) in Triton, forward and backward.

A program has T tokens. It goes over their rows twice, the second time backwards, because what it read last is still in
the cache; all coefficients stay in registers.

Legend: N tokens, G streams, D width, K = G D, O = G (G + 2) coefficients. O in rows of G (h_pre, h_post, then those of
h_res) is padded to [R, C], powers of two; P = R C.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.choose import is_interpreted
from engram.kernels.mhc_pre_post.triton_sinkhorn import positive_matrix, sinkhorn, sinkhorn_backward

# Channels that a program handles at once, in bytes of a row.
CHUNK_BYTES = 256
# The smallest side of a matrix product.
SMALLEST_DOT = 16
# Programs of the weight's gradient: enough to fill any GPU, a constant so that the order of its sums is one too.
WEIGHT_PROGRAMS = 512


@triton.jit
def _tokens(size, T: tl.constexpr):
    token_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    return token_T, token_T < size


@triton.jit
def _grid(G: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Of the padded coefficients [R, C]: row, column, place among the O, and whether there is one."""
    row_RC, column_RC = tl.arange(0, R)[:, None] + tl.zeros([1, C], tl.int32), tl.arange(0, C)[None, :]
    column_RC = column_RC + tl.zeros([R, 1], tl.int32)
    return row_RC, column_RC, row_RC * G + column_RC, (row_RC < G + 2) & (column_RC < G)


@triton.jit
def _flat_grid(G: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """The same for the coefficients in one row [P]: place and whether there is one."""
    row_P, column_P = tl.arange(0, P) // C, tl.arange(0, P) % C
    return row_P * G + column_P, (row_P < G + 2) & (column_P < G)


@triton.jit
def _channels(step, G: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """The channels of a stream that a step is about, and their places in a row: streams take turns."""
    channel_D = step // G * CHUNK + tl.arange(0, CHUNK)
    return channel_D, step % G * D + channel_D


@triton.jit
def _pick(values_TRC, chosen_RC):
    """The one chosen coefficient of each token [T]."""
    return tl.sum(tl.sum(tl.where(chosen_RC[None], values_TRC, 0.0), 2), 1)


@triton.jit
def pre_forward_kernel(
    x,
    weight,
    scale,
    bias,
    u,
    h_post,
    h_res,
    normalised,
    inverse_rms,
    size,
    eps,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    OUTPUTS: tl.constexpr = G * (G + 2)
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    token_T, live_T = _tokens(size, T)
    place_P, exists_P = _flat_grid(G, R * C, C)
    product_TP = tl.zeros([T, R * C], tl.float32)
    squares_T = tl.zeros([T], tl.float32)
    for step in range(CHUNKS * G):
        channel_D, at_D = _channels(step, G, D, CHUNK)
        x_TD = tl.load(
            x + token_T[:, None] * (G * D) + at_D[None], mask=live_T[:, None] & (channel_D < D)[None], other=0.0
        )
        w_DP = tl.load(
            weight + place_P[None].to(tl.int64) * (G * D) + at_D[:, None],
            mask=exists_P[None] & (channel_D < D)[:, None],
            other=0.0,
        )
        product_TP = tl.dot(x_TD.to(w_DP.dtype), w_DP, product_TP, input_precision="ieee")
        squares_T += tl.sum(x_TD.to(tl.float32) * x_TD.to(tl.float32), 1)
    inverse_T = tl.rsqrt(squares_T / (G * D) + eps)
    normalised_TP = product_TP * inverse_T[:, None]
    tl.store(inverse_rms + token_T, inverse_T, mask=live_T)
    tl.store(
        normalised + token_T[:, None] * OUTPUTS + place_P[None], normalised_TP, mask=live_T[:, None] & exists_P[None]
    )

    row_RC, column_RC, place_RC, exists_RC = _grid(G, R, C)
    scale_RC = tl.load(scale + tl.minimum(row_RC, 2))
    bias_RC = tl.load(bias + place_RC, mask=exists_RC, other=0.0)
    logits_TRC = tl.reshape(normalised_TP, [T, R, C]) * scale_RC[None] + bias_RC[None]
    gates_TRC = tl.sigmoid(logits_TRC)
    inside_RC = exists_RC & (row_RC >= 2)
    mixing_TRC = sinkhorn(positive_matrix(logits_TRC, inside_RC), inside_RC, STEPS)
    token_T11, live_T11 = token_T[:, None, None], live_T[:, None, None]
    tl.store(h_post + token_T11 * G + column_RC[None], 2 * gates_TRC, mask=live_T11 & (exists_RC & (row_RC == 1))[None])
    tl.store(h_res + token_T11 * (G * G) + (place_RC - 2 * G)[None], mixing_TRC, mask=live_T11 & inside_RC[None])

    for back in range(CHUNKS):
        channel_D = (CHUNKS - 1 - back) * CHUNK + tl.arange(0, CHUNK)
        mask_TD = live_T[:, None] & (channel_D < D)[None]
        u_TD = tl.zeros([T, CHUNK], tl.float32)
        for g in tl.static_range(G):
            pre_T = _pick(gates_TRC, (row_RC == 0) & (column_RC == g))
            x_TD = tl.load(x + token_T[:, None] * (G * D) + (g * D + channel_D)[None], mask=mask_TD, other=0.0)
            u_TD += pre_T[:, None] * x_TD.to(tl.float32)
        tl.store(u + token_T[:, None] * D + channel_D[None], u_TD.to(u.dtype.element_ty), mask=mask_TD)


@triton.jit
def pre_backward_kernel(
    x,
    weight,
    scale,
    bias,
    normalised,
    inverse_rms,
    du,
    carried,
    dpost,
    dres,
    dx,
    dlogits,
    size,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PADDED: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    CARRIED: tl.constexpr,
):
    OUTPUTS: tl.constexpr = G * (G + 2)
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    token_T, live_T = _tokens(size, T)
    of_pre_TC = tl.zeros([T, C], tl.float32)
    for step in range(CHUNKS * G):
        channel_D, at_D = _channels(step, G, D, CHUNK)
        mask_TD = live_T[:, None] & (channel_D < D)[None]
        du_TD = tl.load(du + token_T[:, None] * D + channel_D[None], mask=mask_TD, other=0.0).to(tl.float32)
        x_TD = tl.load(x + token_T[:, None] * (G * D) + at_D[None], mask=mask_TD, other=0.0).to(tl.float32)
        of_pre_TC += tl.where(tl.arange(0, C)[None] == step % G, tl.sum(du_TD * x_TD, 1)[:, None], 0.0)

    row_RC, column_RC, place_RC, exists_RC = _grid(G, R, C)
    inside_RC = exists_RC & (row_RC >= 2)
    token_T11, live_T11 = token_T[:, None, None], live_T[:, None, None]
    scale_RC = tl.load(scale + tl.minimum(row_RC, 2))
    bias_RC = tl.load(bias + place_RC, mask=exists_RC, other=0.0)
    at_TRC, mask_TRC = token_T11 * OUTPUTS + place_RC[None], live_T11 & exists_RC[None]
    normalised_TRC = tl.load(normalised + at_TRC, mask=mask_TRC, other=0.0)
    logits_TRC = normalised_TRC * scale_RC[None] + bias_RC[None]
    gates_TRC = tl.sigmoid(logits_TRC)
    of_post_TRC = tl.load(
        dpost + token_T11 * G + column_RC[None], mask=live_T11 & (exists_RC & (row_RC == 1))[None], other=0.0
    )
    of_mixing_TRC = tl.load(
        dres + token_T11 * (G * G) + (place_RC - 2 * G)[None], mask=live_T11 & inside_RC[None], other=0.0
    )
    of_gates_TRC = tl.where((row_RC == 0)[None], of_pre_TC[:, None, :], 2 * of_post_TRC) * gates_TRC * (1 - gates_TRC)
    of_logits_TRC = tl.where(
        inside_RC[None],
        sinkhorn_backward(positive_matrix(logits_TRC, inside_RC), of_mixing_TRC, inside_RC, STEPS, STEPS_PADDED),
        tl.where(exists_RC[None], of_gates_TRC, 0.0),
    )
    tl.store(dlogits + at_TRC, of_logits_TRC, mask=mask_TRC)

    inverse_T = tl.load(inverse_rms + token_T, mask=live_T, other=0.0)
    scaled_TRC = of_logits_TRC * scale_RC[None]
    along_row_T = tl.sum(tl.sum(scaled_TRC * normalised_TRC, 2), 1) * inverse_T * inverse_T / (G * D)
    product_TP = tl.reshape(scaled_TRC * inverse_T[:, None, None], [T, R * C]).to(weight.dtype.element_ty)
    place_P, exists_P = _flat_grid(G, R * C, C)
    for back in range(CHUNKS * G):
        step = CHUNKS * G - 1 - back
        channel_D, at_D = _channels(step, G, D, CHUNK)
        mask_TD = live_T[:, None] & (channel_D < D)[None]
        at_TD = token_T[:, None] * (G * D) + at_D[None]
        w_PD = tl.load(
            weight + place_P[:, None].to(tl.int64) * (G * D) + at_D[None],
            mask=exists_P[:, None] & (channel_D < D)[None],
            other=0.0,
        )
        du_TD = tl.load(du + token_T[:, None] * D + channel_D[None], mask=mask_TD, other=0.0).to(tl.float32)
        x_TD = tl.load(x + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        pre_T = _pick(gates_TRC, (row_RC == 0) & (column_RC == step % G))
        dx_TD = pre_T[:, None] * du_TD - along_row_T[:, None] * x_TD
        if CARRIED:
            dx_TD += tl.load(carried + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        dx_TD = tl.dot(product_TP, w_PD, dx_TD, input_precision="ieee")
        tl.store(dx + at_TD, dx_TD.to(dx.dtype.element_ty), mask=mask_TD)


@triton.jit
def weight_gradient_kernel(
    x,
    scale,
    inverse_rms,
    dlogits,
    partial,
    size,
    per_program,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """partial [programs, O, K]: sum of dproduct^T x over the tokens of program_id(1), for CHUNK entries of a row."""
    OUTPUTS: tl.constexpr = G * (G + 2)
    K: tl.constexpr = G * D
    place_P, exists_P = _flat_grid(G, R * C, C)
    scale_P = tl.load(scale + tl.minimum(tl.arange(0, R * C) // C, 2))
    at_K = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    part = tl.program_id(1).to(tl.int64)
    sum_PK = tl.zeros([R * C, CHUNK], tl.float32)
    for first in range(0, per_program, T):
        token_T = part * per_program + first + tl.arange(0, T)
        live_T = token_T < size
        of_logits_TP = tl.load(
            dlogits + token_T[:, None] * OUTPUTS + place_P[None], mask=live_T[:, None] & exists_P[None], other=0.0
        )
        inverse_T = tl.load(inverse_rms + token_T, mask=live_T, other=0.0)
        product_TP = (of_logits_TP * scale_P[None] * inverse_T[:, None]).to(FACTOR)
        x_TK = tl.load(x + token_T[:, None] * K + at_K[None], mask=live_T[:, None] & (at_K < K)[None], other=0.0).to(
            FACTOR
        )
        sum_PK = tl.dot(tl.trans(product_TP), x_TK, sum_PK, input_precision="ieee")
    tl.store(
        partial + part * (OUTPUTS * K) + place_P[:, None].to(tl.int64) * K + at_K[None],
        sum_PK,
        mask=exists_P[:, None] & (at_K < K)[None],
    )


def pre_forward_triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, G, D] -> u [N, D], h_post [N, G], h_res [N, G, G], then for the backward pass the normalised products
    [N, O] and the inverse root mean squares [N]."""
    size, streams, width = x.shape
    u = x.new_empty(size, width)
    h_post, h_res, normalised, inverse_rms = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((size, streams), (size, streams, streams), (size, len(bias)), (size,))
    )
    outputs = (u, h_post, h_res, normalised, inverse_rms)
    if size:
        tokens = _tokens_per_program(size)
        pre_forward_kernel[(triton.cdiv(size, tokens),)](
            x,
            weight.to(_factor_dtype(x)),
            scale,
            bias,
            *outputs,
            size,
            eps,
            **_shape(x),
            STEPS=steps,
            T=tokens,
        )
    return outputs


def pre_backward_triton(
    saved: Sequence[Tensor], du: Tensor, carried: Tensor | None, dpost: Tensor, dres: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale and bias; `saved`: x, weight, scale, bias, normalised, inverse_rms."""
    x, weight, scale, bias, normalised, inverse_rms = saved
    size, streams, width = x.shape
    if not size:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(scale), torch.zeros_like(bias)
    dx, dlogits, shape = torch.empty_like(x), torch.empty_like(normalised), _shape(x)
    pre_backward_kernel[(triton.cdiv(size, SMALLEST_DOT),)](
        x,
        weight.to(_factor_dtype(x)),
        scale,
        bias,
        normalised,
        inverse_rms,
        du,
        carried,
        dpost,
        dres,
        dx,
        dlogits,
        size,
        **shape,
        STEPS=steps,
        STEPS_PADDED=triton.next_power_of_2(steps),
        T=SMALLEST_DOT,
        CARRIED=carried is not None,
    )
    chunks = triton.cdiv(streams * width, shape["CHUNK"])
    per_program = 64 * triton.cdiv(size, 64 * max(1, WEIGHT_PROGRAMS // chunks))
    partial = x.new_empty(triton.cdiv(size, per_program), *weight.shape, dtype=torch.float32)
    weight_gradient_kernel[(chunks, len(partial))](
        x,
        scale,
        inverse_rms,
        dlogits,
        partial,
        size,
        per_program,
        **shape,
        T=64,
        FACTOR={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[_factor_dtype(x)],
    )
    of_scale = (dlogits * normalised).sum(0).split((streams, streams, streams**2))
    return dx, partial.sum(0), torch.stack([part.sum() for part in of_scale]), dlogits.sum(0)


def _shape(x: Tensor) -> dict[str, int]:
    _, streams, width = x.shape
    columns = triton.next_power_of_2(streams)
    rows = max(triton.next_power_of_2(streams + 2), SMALLEST_DOT // columns)
    return dict(G=streams, D=width, R=rows, C=columns, CHUNK=CHUNK_BYTES // x.element_size())


def _tokens_per_program(size: int) -> int:
    """More tokens share each pass over W, unless that leaves multiprocessors idle."""
    return 32 if size >= 8192 else SMALLEST_DOT


def _factor_dtype(x: Tensor) -> torch.dtype:
    """Of the products' factors. The interpreter has no bfloat16 products; these values are the same in float32."""
    return torch.float32 if is_interpreted() else x.dtype
