"""What each memory layer reads, how far it opens and what it adds, at every position of some documents.

Legend: N positions of all documents in their order, L memory layers, T tokens, G residual streams, H columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.padding import padded_batches

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GateReading:
    """Position n is token `token_N[n]` at `position_N[n]` of document `document_N[n]`; documents are one after another.

    gate_LNG; value_LNG = |gate * value|, what the gate lets through; relative_LNG = |memory's output| / |stream|, after
    the convolution; rows_LN = |rows|, all columns together; addresses_LNH with offsets.
    """

    layers: list[int]
    document_N: Ints
    position_N: Ints
    token_N: Ints
    gate_LNG: Floats
    value_LNG: Floats
    relative_LNG: Floats
    rows_LN: Floats
    addresses_LNH: Ints

    @property
    def series(self) -> list[tuple[int, int]]:
        """(layer, stream) in the order of a flattened [L, G]."""
        return [(layer, stream) for layer in self.layers for stream in range(self.gate_LNG.shape[2])]


@torch.inference_mode()
def read_gates(model: Transformer, documents: Sequence[Sequence[int]], max_tokens: int = 8192) -> GateReading:
    """Run each document on its own, in batches of at most `max_tokens` tokens.

    Raises UserError: no tokens, or a model without memory or with an ungated one.
    """
    config = model.config.memory
    if config is None or config.gate is None:
        raise UserError("this model has no gates: model.memory is null, or model.memory.gate is")
    if not documents or not all(len(document) for document in documents):
        raise UserError("the text is empty: gates need at least one token")
    layers = list(config.layer_ids)
    seen: dict[int, dict[str, Tensor]] = {}
    handles = []
    for layer in layers:
        memory = model.get_submodule(f"blocks.{layer}.memory")

        def read(module: Any, inputs: tuple[Tensor, Tensor], output: Tensor, layer: int = layer) -> None:
            seen[layer] = _measure(module, *inputs, output)

        handles.append(memory.register_forward_hook(read))
    was_training = model.training
    model.eval()
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    places: list[Ints] = []
    parts: dict[str, list[Any]] = {}
    try:
        for batch in padded_batches(documents, max_tokens, model.head.weight.device):
            model.hidden(batch.tokens_BT)
            places += [starts[index] + np.arange(lengths[index]) for index in batch.indices]
            for name in seen[layers[0]]:
                both = torch.stack([seen[layer][name][batch.real_BT] for layer in layers])
                parts.setdefault(name, []).append(both.cpu().numpy())
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    # Batches hold the longest documents first.
    order_N = np.argsort(np.concatenate(places))
    arrays = {name: np.concatenate(found, axis=1)[:, order_N] for name, found in parts.items()}
    return GateReading(
        layers=layers,
        document_N=np.repeat(np.arange(len(documents)), lengths),
        position_N=np.concatenate([np.arange(length) for length in lengths]),
        token_N=np.concatenate([np.asarray(document, np.int64) for document in documents]),
        **arrays,
    )


def _measure(memory: Any, hidden_BTGD: Tensor, ids_BTH: Tensor, output_BTGD: Tensor) -> dict[str, Tensor]:
    rows_BTM = memory.embed(ids_BTH, hidden_BTGD.dtype)
    gate_BTG = memory.gates(hidden_BTGD, ids_BTH)
    value_BTD = memory.values(rows_BTM)
    stream_BTG = hidden_BTGD.float().norm(dim=-1).clamp(min=1e-12)
    return {
        "gate_LNG": gate_BTG.float(),
        "value_LNG": gate_BTG.float() * value_BTD.float().norm(dim=-1, keepdim=True),
        "relative_LNG": output_BTGD.float().norm(dim=-1) / stream_BTG,
        "rows_LN": rows_BTM.float().norm(dim=-1),
        "addresses_LNH": ids_BTH,
    }
