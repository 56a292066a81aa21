"""How far each memory layer opens for each token: all layers and streams, none picked by hand.

Legend: L memory layers, T tokens, G residual streams.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.data.tokenizer import REPLACEMENT, Tokenizer
from engram.model.transformer import Transformer
from engram.report.heat import heat_rows, heat_scale
from eval.gates.reading import read_gates

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


def measure(model: Transformer, ids: Sequence[int], tokens: Sequence[str]) -> Gates:
    """Run `ids` through the model and read its gates; `tokens` are their texts.

    Raises UserError: no ids, or a model without memory or with an ungated one.
    """
    found = read_gates(model, [ids])
    return Gates(list(tokens), found.layers, torch.from_numpy(found.gate_LNG), torch.from_numpy(found.relative_LNG))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What to show for each id: its text, or the vocabulary's own name of a piece of a character."""
    texts, raw = tokenizer.texts(), tokenizer.raw_tokens()
    return [raw[token] if REPLACEMENT in texts[token] else texts[token] for token in ids]
