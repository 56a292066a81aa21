"""How far each memory layer opens for each token: all layers and streams, none picked by hand.

Legend: L memory layers, T tokens, G residual streams.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.config import UserError
from engram.data.tokenizer import REPLACEMENT, Tokenizer
from engram.model.transformer import Transformer
from engram.report.heat import heat_rows, heat_scale

CAPTION = (
    "Background: the gate, from 0 (closed) to 1 (the memory's value is added whole). A token's colour is about "
    "the n-grams that end in it. Hover for the value, and for the size of what the memory adds relative to its stream."
)


@dataclass(frozen=True)
class Gates:
    """Gates of one text, float32 [L, T, G], and |memory output| / |stream| in the same places."""

    tokens: list[str]
    layers: list[int]
    gates_LTG: Tensor
    relative_LTG: Tensor

    def columns(self) -> dict[str, list[Any]]:
        """The long table: one row per token, layer and stream."""
        num_layers, num_tokens, num_streams = self.gates_LTG.shape
        places = list(itertools.product(range(num_layers), range(num_tokens), range(num_streams)))
        return {
            "position": [t for _, t, _ in places],
            "token": [self.tokens[t] for _, t, _ in places],
            "layer": [self.layers[layer] for layer, _, _ in places],
            "stream": [g for _, _, g in places],
            "gate": self.gates_LTG.flatten().tolist(),
            "relative_output": self.relative_LTG.flatten().tolist(),
        }

    def html(self) -> str:
        """One row of coloured tokens for each layer and stream."""
        labels, values, titles = [], [], []
        for layer, gates_TG, relative_TG in zip(self.layers, self.gates_LTG, self.relative_LTG, strict=True):
            for stream, (gates, relative) in enumerate(zip(gates_TG.T.tolist(), relative_TG.T.tolist(), strict=True)):
                labels.append(f"layer {layer}, stream {stream}: mean {sum(gates) / len(gates):.2f}")
                values.append(gates)
                titles.append(
                    [f"gate {g:.3f}, adds {r:.3f} of the stream" for g, r in zip(gates, relative, strict=True)]
                )
        return heat_rows(labels, self.tokens, values, titles) + heat_scale()


@torch.inference_mode()
def measure(model: Transformer, ids: Sequence[int], tokens: Sequence[str]) -> Gates:
    """Run `ids` through the model and read its gates; `tokens` are their texts.

    Raises UserError: no ids, or a model without memory or with an ungated one.
    """
    if model.config.memory is None or model.config.memory.gate is None:
        raise UserError("this model has no gates: model.memory is null, or model.memory.gate is")
    if not ids:
        raise UserError("the text is empty: gates need at least one token")
    gates: dict[int, Tensor] = {}
    relative: dict[int, Tensor] = {}
    handles = []
    for layer in model.config.memory.layer_ids:
        memory = model.get_submodule(f"blocks.{layer}.memory")

        def read(module: Any, inputs: tuple[Tensor, Tensor], output: Tensor, layer: int = layer) -> None:
            gates[layer] = module.gates(*inputs)[0].float().cpu()
            added, stream = output[0].float().norm(dim=-1), inputs[0][0].float().norm(dim=-1)
            relative[layer] = (added / stream.clamp(min=1e-12)).cpu()

        handles.append(memory.register_forward_hook(read))
    was_training = model.training
    model.eval()
    try:
        model.hidden(torch.tensor([list(ids)], device=model.head.weight.device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    layers = sorted(gates)
    return Gates(
        list(tokens),
        layers,
        torch.stack([gates[layer] for layer in layers]),
        torch.stack([relative[layer] for layer in layers]),
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What to show for each id: its text, or the vocabulary's own name of a piece of a character."""
    texts, raw = tokenizer.texts(), tokenizer.raw_tokens()
    return [raw[token] if REPLACEMENT in texts[token] else texts[token] for token in ids]
