"""mHC's write (post) in Triton, forward and backward: each tensor is read or written once.

Legend: N tokens, T of them in a program, G streams, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 128


@triton.jit
def post_forward_kernel(
    x, y, h_post, h_res, out, size, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr
):
    token_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    channel_D = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live_T = token_T < size
    mask_TD = live_T[:, None] & (channel_D < D)[None]
    at_TD = token_T[:, None] * (G * D) + channel_D[None]
    y_TD = tl.load(y + token_T[:, None] * D + channel_D[None], mask=mask_TD, other=0.0).to(tl.float32)
    streams = ()
    for i in tl.static_range(G):
        streams = streams + (tl.load(x + at_TD + i * D, mask=mask_TD, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    for o in tl.static_range(G):
        out_TD = tl.load(h_post + token_T * G + o, mask=live_T, other=0.0)[:, None] * y_TD
        for i in tl.static_range(G):
            out_TD += tl.load(h_res + token_T * (G * G) + o * G + i, mask=live_T, other=0.0)[:, None] * streams[i]
        tl.store(out + at_TD + o * D, out_TD.to(out.dtype.element_ty), mask=mask_TD)


@triton.jit
def post_backward_kernel(
    x,
    y,
    h_post,
    h_res,
    dout,
    dx,
    dy,
    dpost,
    dres,
    size,
    G: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    token_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    live_T = token_T < size
    # Products of the outputs' gradients with every stream, then with y: C places for at least G (G + 1).
    place_C = tl.arange(0, C)
    products_TC = tl.zeros([T, C], tl.float32)
    for first in range(0, D, CHUNK):
        channel_D = first + tl.arange(0, CHUNK)
        mask_TD = live_T[:, None] & (channel_D < D)[None]
        at_TD = token_T[:, None] * (G * D) + channel_D[None]
        y_TD = tl.load(y + token_T[:, None] * D + channel_D[None], mask=mask_TD, other=0.0).to(tl.float32)
        dy_TD = tl.zeros([T, CHUNK], tl.float32)
        of_out = ()
        for o in tl.static_range(G):
            of_out_TD = tl.load(dout + at_TD + o * D, mask=mask_TD, other=0.0).to(tl.float32)
            dy_TD += tl.load(h_post + token_T * G + o, mask=live_T, other=0.0)[:, None] * of_out_TD
            products_TC += tl.where(place_C[None] == G * G + o, tl.sum(of_out_TD * y_TD, 1)[:, None], 0.0)
            of_out = of_out + (of_out_TD,)  # type: ignore[assignment]
        tl.store(dy + token_T[:, None] * D + channel_D[None], dy_TD.to(dy.dtype.element_ty), mask=mask_TD)
        for i in tl.static_range(G):
            x_TD = tl.load(x + at_TD + i * D, mask=mask_TD, other=0.0).to(tl.float32)
            dx_TD = tl.zeros([T, CHUNK], tl.float32)
            for o in tl.static_range(G):
                mixing_T = tl.load(h_res + token_T * (G * G) + o * G + i, mask=live_T, other=0.0)
                dx_TD += mixing_T[:, None] * of_out[o]
                products_TC += tl.where(place_C[None] == o * G + i, tl.sum(of_out[o] * x_TD, 1)[:, None], 0.0)
            tl.store(dx + at_TD + i * D, dx_TD.to(dx.dtype.element_ty), mask=mask_TD)
    tl.store(
        dres + token_T[:, None] * (G * G) + place_C[None],
        products_TC,
        mask=live_T[:, None] & (place_C < G * G)[None],
    )
    tl.store(
        dpost + token_T[:, None] * G + (place_C - G * G)[None],
        products_TC,
        mask=live_T[:, None] & ((place_C >= G * G) & (place_C < G * (G + 1)))[None],
    )


def post_forward_triton(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x [N, G, D], y [N, D], h_post [N, G], h_res [N, G, G] -> [N, G, D]."""
    size, streams, width = x.shape
    out = torch.empty_like(x)
    if size:
        tokens = _tokens(streams)
        grid = (triton.cdiv(size, tokens), triton.cdiv(width, CHANNELS))
        post_forward_kernel[grid](x, y, h_post, h_res, out, size, G=streams, D=width, T=tokens, CHUNK=CHANNELS)
    return out


def post_backward_triton(
    x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, h_post and h_res."""
    size, streams, width = x.shape
    dx, dy, dpost, dres = (torch.empty_like(tensor) for tensor in (x, y, h_post, h_res))
    if size:
        places = triton.next_power_of_2(streams * (streams + 1))
        tokens = _tokens(streams)
        post_backward_kernel[(triton.cdiv(size, tokens),)](
            x,
            y,
            h_post,
            h_res,
            dout,
            dx,
            dy,
            dpost,
            dres,
            size,
            G=streams,
            D=width,
            C=places,
            T=tokens,
            CHUNK=CHANNELS,
        )
    return dx, dy, dpost, dres


def _tokens(streams: int) -> int:
    """Of a program: a chunk of every stream fits its registers."""
    return 16 if streams <= 4 else 8
