"""mHC's read and write in plain torch: the specification.

Legend: B batch, T tokens, G streams, D width, O = G (G + 2) coefficients.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-20


def mhc_pre_ref(
    x_BTGD: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """u = sum_i h_pre[i] x[i], and the coefficients that `mhc_post_ref` takes."""
    h_pre, h_post, h_res = mhc_coefficients_ref(x_BTGD, weight, scale, bias, steps=steps, eps=eps)
    u_BTD = (h_pre.unsqueeze(-1) * x_BTGD).sum(2)
    return u_BTD.to(x_BTGD.dtype), h_post, h_res


def mhc_post_ref(x_BTGD: Tensor, y_BTD: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x'[o] = sum_i h_res[o, i] x[i] + h_post[o] y."""
    mixed = (h_res.unsqueeze(-1) * x_BTGD.unsqueeze(2)).sum(3)
    return (mixed + h_post.unsqueeze(-1) * y_BTD.unsqueeze(2)).to(x_BTGD.dtype)


def mhc_coefficients_ref(
    x_BTGD: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h_pre [B, T, G], h_post [B, T, G], h_res [B, T, G out, G in], in float32 or wider."""
    streams = x_BTGD.shape[2]
    # The product's factors have the dtype of x, as in every matrix product of the model; nothing else is rounded.
    flat = x_BTGD.flatten(2)
    weight = weight.to(flat.dtype)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat, weight = flat.float(), weight.float()
    # The norm is a scalar of the token, so it follows the product.
    logits = F.linear(flat, weight) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    sizes = (streams, streams, streams**2)
    pre, post, res = (
        part * factor + shift
        for part, factor, shift in zip(logits.split(sizes, -1), scale, bias.split(sizes), strict=True)
    )
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), sinkhorn_ref(res.unflatten(-1, (streams, streams)), steps)


def sinkhorn_ref(logits: Tensor, steps: int) -> Tensor:
    """exp(logits) [..., G, G] after `steps` column-then-row normalisations: each row of the result sums to 1.

    Each column starts with a largest entry of 1: the scale cancels in the first normalisation and keeps exp in range.
    No entry starts so low that a sum could be 0.
    """
    x = torch.exp(logits - logits.detach().amax(-2, keepdim=True)).clamp_min(FLOOR)
    for _ in range(steps):
        x = x / x.sum(-2, keepdim=True)
        x = x / x.sum(-1, keepdim=True)
    return x
