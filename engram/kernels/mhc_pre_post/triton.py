"""mHC in Triton: the two halves, and their kernels as the shipped configs launch them."""

import functools

import torch
from torch import Tensor

from engram.kernels.compile_ahead import Build, record
from engram.kernels.mhc_pre_post.triton_post import post_backward_triton, post_forward_triton
from engram.kernels.mhc_pre_post.triton_pre import pre_backward_triton, pre_forward_triton

__all__ = ["builds", "post_backward_triton", "post_forward_triton", "pre_backward_triton", "pre_forward_triton"]


def builds() -> list[Build]:
    """Forward and backward of the shipped widths, all with four streams, and of eight streams."""
    shapes = [
        # tokens, streams, width
        ("quickstart", (4096, 4, 128), torch.float32),
        ("quickstart", (4096, 4, 128), torch.bfloat16),
        ("tiny", (4096, 4, 192), torch.float32),
        ("tiny", (4096, 4, 192), torch.bfloat16),
        ("engram_27b", (32768, 4, 2560), torch.bfloat16),
        ("v4_1", (32768, 4, 5120), torch.bfloat16),
        ("eight streams", (32768, 8, 768), torch.bfloat16),
    ]
    return [
        build
        for name, shape, dtype in shapes
        for build in record(f"{name} {str(dtype).removeprefix('torch.')}", functools.partial(_launch, *shape, dtype))
    ]


def _launch(tokens: int, streams: int, width: int, dtype: torch.dtype) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    outputs = streams * (streams + 2)
    x, weight = meta(tokens, streams, width, dtype=dtype), meta(outputs, streams * width)
    parameters = (weight, meta(3), meta(outputs))
    u, h_post, h_res, *kept = pre_forward_triton(x, *parameters, steps=20, eps=1e-6)
    out = post_forward_triton(x, u, h_post, h_res)
    carried, du, dpost, dres = post_backward_triton(x, u, h_post, h_res, out)
    pre_backward_triton((x, *parameters, *kept), du, carried, dpost, dres, steps=20)
