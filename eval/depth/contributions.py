"""What each block adds to the residual streams, and what would be missing without it.

    contribution c_l = x_{l+1} - x_l,   size |c_l| / |x_l|,   cosine <c_l, x_l> / (|c_l| |x_l|)
    skipping block l: x_{l+1} = x_l;    KL(p || p without l),   change_{l,m} = |c_m without l - c_m| / |c_m|, m > l

Csordas et al. 2025 (arXiv 2505.13898), whose residual stream is plain. Here vectors hold all streams of a token, and
with hyper-connections a contribution contains what the connection mixes between streams. Skipping a block skips its
memory too. Numbers are summed by document.

Legend: B rows, T tokens, G residual streams, D hidden, V vocabulary, N documents, L blocks, S parts, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from engram.config import ModelConfig
from engram.model.transformer import Block, Transformer
from eval.capture import Capture
from eval.padding import PaddedBatch, padded_batches
from eval.points import Point
from eval.states import batch_tokens, chunk_tokens

# A part of a block reads the streams at the first point and leaves them at the second.
PARTS: dict[str, tuple[Point, Point]] = {
    "block": ("resid_pre", "resid_post"),
    "memory": ("resid_pre", "resid_memory"),
    "attention": ("resid_memory", "resid_mid"),
    "ffn": ("resid_mid", "resid_post"),
}
_POINTS: tuple[Point, ...] = ("resid_pre", "resid_memory", "resid_mid", "resid_post")


class Part(NamedTuple):
    """A block or one of its sublayers; blocks without memory have no such part."""

    layer: int
    name: str


@dataclass(frozen=True)
class Depth:
    """Sums over each document's tokens, float64, and their counts int64 [N].

    `size` and `cosine` [N, S] belong to `parts`; `skipped_kl` [N, L] in nats; `change` [N, L skipped, L later] is NaN
    where the later block is not later.
    """

    parts: list[Part]
    size: npt.NDArray[np.float64]
    cosine: npt.NDArray[np.float64]
    skipped_kl: npt.NDArray[np.float64]
    change: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


def parts(config: ModelConfig) -> list[Part]:
    """All parts, the blocks first."""
    memory = config.memory.layer_ids if config.memory else ()
    return [
        Part(layer, name) for name in PARTS for layer in range(config.num_layers) if name != "memory" or layer in memory
    ]


@torch.inference_mode()
def measure(
    model: Transformer, documents: Sequence[Sequence[int]], *, advance: Callable[[int], None] = lambda tokens: None
) -> Depth:
    """Read `documents` at every token that has a next one, once whole and once without each block.

    A part that adds nothing has size 0 and cosine 0. `advance` hears how many tokens were read.
    """
    layers, found, device = model.config.num_layers, parts(model.config), model.head.weight.device
    rows = [document[:-1] for document in documents]
    shape = {"size": len(found), "cosine": len(found), "skipped_kl": layers, "change": layers**2}
    sums = {name: torch.zeros(len(rows), width, dtype=torch.float64, device=device) for name, width in shape.items()}
    # The streams at four points of each block, and their contributions twice.
    most = batch_tokens(model.config, 6 * layers)
    with Capture(model, _POINTS) as seen:
        for batch in padded_batches(rows, most, device):
            for name, value_nW in _read(model, seen, batch, found).items():
                lengths = batch.real_BT.sum(1)
                document_n = torch.tensor(batch.indices, device=device).repeat_interleave(lengths)
                sums[name].index_add_(0, document_n, value_nW.double())
            seen.clear()
            advance(int(batch.real_BT.sum()))
    done = {name: total.cpu().numpy() for name, total in sums.items()}
    done["change"] = done["change"].reshape(-1, layers, layers)
    done["change"][:, *np.tril_indices(layers)] = np.nan
    return Depth(found, **done, counts=np.array([len(row) for row in rows], np.int64))


def _read(model: Transformer, seen: Capture, batch: PaddedBatch, found: Sequence[Part]) -> dict[str, Tensor]:
    """All numbers of one batch, by name, for each of its real tokens [n, ...]."""
    layers = model.config.num_layers
    whole_nD = model.hidden(batch.tokens_BT)[batch.real_BT]
    states = {key: seen[key][batch.real_BT].flatten(1).float() for key in _keys(layers)}
    size, cosine = [], []
    for part in found:
        before, after = (states[point, part.layer] for point in PARTS[part.name])
        size.append(_ratio((after - before).norm(dim=1), before.norm(dim=1)))
        cosine.append(F.cosine_similarity(after - before, before, dim=1))
    added = [states["resid_post", layer] - states["resid_pre", layer] for layer in range(layers)]
    del states
    kl, change = [], []
    for layer in range(layers):
        without_nD = _hidden_without(model, layer, batch.tokens_BT)[batch.real_BT]
        kl.append(_kl_divergence(model, whole_nD, without_nD))
        for later in range(layers):
            if later <= layer:
                change.append(torch.zeros_like(kl[-1]))
                continue
            other = (seen["resid_post", later] - seen["resid_pre", later])[batch.real_BT].flatten(1).float()
            change.append(_ratio((other - added[later]).norm(dim=1), added[later].norm(dim=1)))
    found_lists = {"size": size, "cosine": cosine, "skipped_kl": kl, "change": change}
    return {name: torch.stack(values, 1) for name, values in found_lists.items()}


def _keys(layers: int) -> list[tuple[Point, int]]:
    return [(point, layer) for layer in range(layers) for point in _POINTS]


def _ratio(a_n: Tensor, b_n: Tensor) -> Tensor:
    """|a| / |b|, 0 where both are 0: a block that adds nothing has nothing to change."""
    return torch.where((a_n == 0) & (b_n == 0), 0.0, a_n / b_n)


def _hidden_without(model: Transformer, layer: int, tokens_BT: Tensor) -> Tensor:
    """`model.hidden` where block `layer` returns what it reads."""
    block = cast(Block, model.blocks[layer])
    hook = block.register_forward_hook(lambda _, inputs, output: inputs[0])
    try:
        return model.hidden(tokens_BT)
    finally:
        hook.remove()


def _kl_divergence(model: Transformer, whole_nD: Tensor, without_nD: Tensor) -> Tensor:
    """KL(p || q) float32 [n] of two final states, by chunks of tokens."""
    size = chunk_tokens(model.config.vocab_size)
    found = []
    for whole, without in zip(whole_nD.split(size), without_nD.split(size), strict=True):
        logp, logq = torch.log_softmax(model.head(whole).float(), 1), torch.log_softmax(model.head(without).float(), 1)
        found.append(torch.linalg.vecdot(logp.exp(), logp - logq))
    return torch.cat(found)
