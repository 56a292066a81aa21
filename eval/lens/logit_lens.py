"""LogitLens: what the model would predict if it stopped at a depth, against what it predicts in the end.

    p_l = softmax(head(norm(merge(x_l)))),   p_L the model's own output

The norm is computed anew on each state. All numbers in nats, summed by document: tokens of one document are not
independent. Following Csordas et al. 2025 (arXiv 2505.13898), whom the Engram paper (section on LogitLens) cites, the
main direction is KL(p_l || p_L); the tuned lens (Belrose et al. 2023) uses the other one.

Legend: B rows, T tokens, G residual streams, D hidden, V vocabulary, N documents, n tokens of one chunk, P places,
M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.config import ModelConfig
from engram.model.transformer import Transformer
from eval.capture import Capture
from eval.padding import padded_batches
from eval.points import Point
from eval.states import batch_tokens, chunk_tokens, merged_states

METRICS = (
    "kl_layer_to_final",
    "kl_final_to_layer",
    "entropy",
    "cross_entropy",
    "top1_agreement",
    "top5_agreement",
)


@dataclass(frozen=True)
class Place:
    """Where the lens reads: the streams after `depth` blocks, or in block `depth` right after its memory was added.

    `stream` None is the model's own merge of all streams.
    """

    name: str
    depth: int
    point: Point
    layer: int
    stream: int | None = None

    @property
    def on_curve(self) -> bool:
        """Whether this is one of the places 0..L between whole blocks, of the merged streams."""
        return self.stream is None and self.point != "resid_memory"


class _Predicted(NamedTuple):
    """A distribution over the next token, and its five likeliest tokens."""

    logp_nV: Tensor
    p_nV: Tensor
    best_nK: Tensor


Translate = Callable[[Place, Tensor], Tensor]


@dataclass(frozen=True)
class Lens:
    """Sums over each document's tokens, float64 [N, P, M] in the order of METRICS, and their counts int64 [N]."""

    places: list[Place]
    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @property
    def curve(self) -> list[int]:
        """Indices of the places 0..L."""
        return [index for index, place in enumerate(self.places) if place.on_curve]


def places(config: ModelConfig, streams: bool = False) -> list[Place]:
    """The embedding, every block's output and every memory's, in the order of the pass; then each stream on its own."""
    merged = [Place("embedding", 0, "resid_pre", 0)]
    for layer in range(config.num_layers):
        if config.memory and layer in config.memory.layer_ids:
            merged.append(Place(f"memory {layer}", layer, "resid_memory", layer))
        merged.append(Place(f"block {layer}", layer + 1, "resid_post", layer))
    if not streams:
        return merged
    return merged + [
        Place(place.name, place.depth, place.point, place.layer, stream)
        for stream in range(config.hc_mult)
        for place in merged
    ]


@torch.inference_mode()
def measure(
    model: Transformer,
    documents: Sequence[Sequence[int]],
    *,
    streams: bool = False,
    translate: Translate | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Lens:
    """Read `documents` (two tokens at least) at all places, at every token that has a next one.

    `streams` adds each residual stream through norm and head alone. `translate` maps the states [n, D] of a place
    before the norm (the tuned lens). `advance` hears how many tokens were read.
    """
    found = places(model.config, streams)
    device = model.head.weight.device
    sums_NPM = torch.zeros(len(documents), len(found), len(METRICS), dtype=torch.float64, device=device)
    rows = [document[:-1] for document in documents]
    points = {place.point for place in found}
    with Capture(model, points) as seen:
        for batch in padded_batches(rows, batch_tokens(model.config, len(found)), device):
            seen.clear()
            model.hidden(batch.tokens_BT)
            where = batch.real_BT.flatten().nonzero().squeeze(1)
            lengths = torch.tensor([len(rows[index]) for index in batch.indices], device=device)
            document_n = torch.tensor(batch.indices, device=device).repeat_interleave(lengths)
            next_n = torch.tensor([token for index in batch.indices for token in documents[index][1:]], device=device)
            for part in torch.arange(len(where), device=device).split(chunk_tokens(model.config.vocab_size)):
                at = where[part]
                final = _predict(model, _state(model, seen, _last(model), at))
                read = []
                for place in found:
                    x_nD = _state(model, seen, place, at)
                    predicted = _predict(model, x_nD if translate is None else translate(place, x_nD))
                    read.append(_compare(predicted, final, next_n[part]))
                sums_NPM.index_add_(0, document_n[part], torch.stack(read, 1))
            advance(len(where))
    counts = np.array([len(row) for row in rows], np.int64)
    return Lens(found, sums_NPM.cpu().numpy(), counts)


def final_logprobs(model: Transformer, x_nD: Tensor) -> Tensor:
    """log p float32 [n, V] of merged states."""
    return torch.log_softmax(model.head(model.norm(x_nD)).float(), dim=-1)


def _last(model: Transformer) -> Place:
    layer = model.config.num_layers - 1
    return Place(f"block {layer}", layer + 1, "resid_post", layer)


def _state(model: Transformer, seen: Capture, place: Place, at: Tensor) -> Tensor:
    x_nGD = seen[place.point, place.layer].flatten(0, 1)[at]
    return merged_states(model, x_nGD) if place.stream is None else x_nGD[:, place.stream]


def _predict(model: Transformer, x_nD: Tensor) -> _Predicted:
    logp_nV = final_logprobs(model, x_nD)
    return _Predicted(logp_nV, logp_nV.exp(), logp_nV.topk(min(5, logp_nV.shape[1])).indices)


def _compare(predicted: _Predicted, final: _Predicted, next_n: Tensor) -> Tensor:
    """All metrics of one place, float64 [n, M]."""
    logp_nV, p_nV, best_nK = predicted
    excess_nV = logp_nV - final.logp_nV
    shared_n = (best_nK.unsqueeze(2) == final.best_nK.unsqueeze(1)).sum((1, 2))
    metrics = (
        torch.linalg.vecdot(p_nV, excess_nV),
        -torch.linalg.vecdot(final.p_nV, excess_nV),
        -torch.linalg.vecdot(p_nV, logp_nV),
        -logp_nV.gather(1, next_n.unsqueeze(1)).squeeze(1),
        best_nK[:, 0] == final.best_nK[:, 0],
        shared_n / best_nK.shape[1],
    )
    return torch.stack([metric.double() for metric in metrics], 1)
