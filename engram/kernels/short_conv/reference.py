"""The specification of `short_conv` in plain torch. Letters: B batch, T tokens, G streams, D hidden size, K taps."""

import torch
import torch.nn.functional as F


def short_conv_ref(x: torch.Tensor, weight: torch.Tensor, *, dilation: int) -> torch.Tensor:
    length, taps = x.shape[1], weight.shape[-1]
    past = (taps - 1) * dilation
    padded_BTGD = F.pad(x, (0, 0, 0, 0, past, 0))
    out_BTGD = x * weight[..., -1]
    for tap in range(taps - 1):
        out_BTGD = torch.addcmul(out_BTGD, padded_BTGD[:, tap * dilation : tap * dilation + length], weight[..., tap])
    return out_BTGD
