"""Cross-entropy of a linear head: with all logits at once (the specification), and of one chunk's logits.

Legend: T tokens, D hidden, V vocabulary, N tokens of one chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def linear_cross_entropy_ref(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """l_t = -log softmax(W x_t)[target_t] in float32 [T]; 0 where the target is -100."""
    logits = (x_TD @ weight_VD.to(x_TD.dtype).t()).float()
    return F.cross_entropy(logits, targets_T, ignore_index=IGNORE, reduction="none")


def cross_entropy_chunk(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Losses float32 [N]."""
    return _losses(logits_NV.float(), targets_N)[0]


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Losses float32 [N]; the logits become their gradient, softmax - onehot (0 where the target is -100)."""
    logits = logits_NV.float()
    losses, log_norms = _losses(logits, targets_N)
    columns = torch.arange(logits.shape[1], device=logits.device)
    softmax = torch.exp(logits - log_norms.unsqueeze(1))
    logits_NV.copy_(softmax - (columns == targets_N.unsqueeze(1)).float())
    return losses


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log-normalisers [N]; of an ignored token infinity, which makes its softmax 0."""
    ignored = targets == IGNORE
    log_norms = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, torch.where(ignored, 0, targets).unsqueeze(1)).squeeze(1)
    return torch.where(ignored, 0.0, log_norms - picked), torch.where(ignored, float("inf"), log_norms)
