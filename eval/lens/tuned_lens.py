"""The tuned lens: LogitLens after one learned affine map for each place, a control for how the lens reads early layers.

    x'_l = x_l + A_l x_l + r_l b_l,   A_l, b_l = argmin mean_t KL(p_L || softmax(head(norm(x'_l))))

Belrose et al. 2023 (arXiv 2303.08112), on the merged streams. r_l is the root mean square of the states, so that one
learning rate fits all depths. What a linear map can read at a depth need not be what the model uses there.

Legend: B rows, T tokens, D hidden, n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.model.transformer import Transformer
from eval.capture import Capture
from eval.lens.logit_lens import Place, Translate, final_logprobs, places
from eval.padding import padded_batches
from eval.states import batch_tokens, merged_states


@dataclass(frozen=True)
class Training:
    """Adam with a learning rate that falls to zero along a half cosine; `batch_size` tokens are drawn at each step."""

    steps: int = 300
    batch_size: int = 256
    lr: float = 5e-3
    seed: int = 0


class Affine(nn.Module):
    """x + A x + r b, which starts as the identity."""

    scale: Tensor

    def __init__(self, x_nD: Tensor) -> None:
        super().__init__()
        size = x_nD.shape[1]
        self.weight = nn.Parameter(torch.zeros(size, size, device=x_nD.device))
        self.bias = nn.Parameter(torch.zeros(size, device=x_nD.device))
        self.register_buffer("scale", x_nD.square().mean().sqrt())

    def forward(self, x_nD: Tensor) -> Tensor:
        return x_nD + F.linear(x_nD, self.weight) + self.scale * self.bias


def fit(
    model: Transformer,
    documents: Sequence[Sequence[int]],
    training: Training = Training(),
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Affine]:
    """One map for each place but the last, by the place's name, learned on `documents` in float32.

    Holds the merged states of all their tokens at all places. Measure on other documents.
    """
    states, final_nD = _collect(model, documents)
    # The model's own weights are constants here.
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return {name: _fit_one(model, x_nD, final_nD, training, advance) for name, x_nD in states.items()}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def translation(maps: Mapping[str, Affine]) -> Translate:
    """What `logit_lens.measure` applies; places without a map are read as they are."""

    def translate(place: Place, x_nD: Tensor) -> Tensor:
        found = maps.get(place.name)
        return x_nD if found is None else found(x_nD)

    return translate


def _fit_one(
    model: Transformer, x_nD: Tensor, final_nD: Tensor, training: Training, advance: Callable[[int], None]
) -> Affine:
    affine = Affine(x_nD)
    optimizer = torch.optim.Adam(affine.parameters(), lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.steps):
        drawn = torch.randint(len(x_nD), (min(training.batch_size, len(x_nD)),), generator=generator).to(x_nD.device)
        final_nV = final_logprobs(model, final_nD[drawn])
        loss = F.kl_div(final_logprobs(model, affine(x_nD[drawn])), final_nV, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    return affine.requires_grad_(False)


@torch.no_grad()
def _collect(model: Transformer, documents: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Merged states float32 [n, D] of each place but the last, by name, and those of the last."""
    found = places(model.config)
    kept: dict[str, list[Tensor]] = {place.name: [] for place in found}
    with Capture(model, {place.point for place in found}) as seen:
        for batch in padded_batches(documents, batch_tokens(model.config, len(found)), model.head.weight.device):
            seen.clear()
            model.hidden(batch.tokens_BT)
            for place in found:
                kept[place.name].append(merged_states(model, seen[place.point, place.layer][batch.real_BT]).float())
    states = {name: torch.cat(parts) for name, parts in kept.items()}
    final_nD = states.pop(found[-1].name)
    return states, final_nD
