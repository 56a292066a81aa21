"""What a model computes on the way, by name: states of the residual streams, sublayers' outputs, gates, expert choices.

Nothing runs, and nothing is kept, outside of a `Capture`: the hooks stand on the modules while it is open.

Legend: B batch, T tokens, G residual streams, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from engram.model.moe import MoE, Routed
from engram.model.transformer import Block, Transformer
from eval.points import Point


class Capture:
    """`with Capture(model, ["resid_post"]) as seen: model.hidden(tokens)` leaves `seen["resid_post", layer]`.

    Tensors are detached, on the model's device and in its compute dtype, and belong to the latest forward pass:
    `clear()` frees them. Layers that have no such point (no memory, no experts, no gate) are absent.

    | point | shape | |
    |---|---|---|
    | `resid_pre` | [B, T, G, D] | what a block reads |
    | `resid_memory` | [B, T, G, D] | after the memory was added (`resid_pre` in a block without one) |
    | `resid_mid` | [B, T, G, D] | after attention |
    | `resid_post` | [B, T, G, D] | what a block returns |
    | `memory_out` | [B, T, G, D] | what the memory computes; G = 1 where it writes through a connection of its own |
    | `attn_out`, `ffn_out` | [B, T, D] | what the sublayers compute, before the connection spreads it |
    | `gates` | [B, T, G] float32 | how far each stream opens to the memory |
    | `experts`, `expert_weights` | [B, T, K] int64, float32 | the router's choices and their weights |
    """

    def __init__(self, model: Transformer, points: Iterable[Point], layers: Sequence[int] | None = None) -> None:
        self._model = model
        self._points = frozenset(points)
        unknown = self._points - set(get_args(Point))
        assert not unknown, f"no such points: {unknown}"
        self._layers = range(model.config.num_layers) if layers is None else layers
        self._seen: dict[tuple[Point, int], Tensor] = {}
        self._handles: list[Any] = []

    def __getitem__(self, key: tuple[Point, int]) -> Tensor:
        return self._seen[key]

    def __contains__(self, key: tuple[Point, int]) -> bool:
        return key in self._seen

    def layers(self, point: Point) -> list[int]:
        """Layers where `point` was seen, ascending."""
        return sorted(layer for name, layer in self._seen if name == point)

    def clear(self) -> None:
        self._seen.clear()

    def __enter__(self) -> Capture:
        for layer in self._layers:
            self._attach(layer, cast(Block, self._model.blocks[layer]))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, layer: int, block: Block) -> None:
        def keep(point: Point, value: Tensor) -> None:
            self._seen[point, layer] = value.detach()

        def on_input(module: nn.Module, point: Point) -> None:
            if point in self._points:
                hook = module.register_forward_pre_hook(lambda _, inputs: keep(point, inputs[0]))
                self._handles.append(hook)

        def on_output(module: nn.Module, point: Point, pick: Callable[[Any], Tensor] = _itself) -> None:
            if point in self._points:
                hook = module.register_forward_hook(lambda _, inputs, output: keep(point, pick(output)))
                self._handles.append(hook)

        on_input(block, "resid_pre")
        on_input(block.attn_connection, "resid_memory")
        on_output(block.attn_connection, "resid_mid")
        on_output(block, "resid_post")
        on_output(block.attn, "attn_out")
        on_output(block.ffn, "ffn_out", _fed)
        if block.memory is not None:
            on_output(block.memory, "memory_out")
            if "gates" in self._points and block.memory.config.gate is not None:
                read = block.memory.gates
                hook = block.memory.register_forward_hook(lambda _, inputs, output: keep("gates", read(*inputs)))
                self._handles.append(hook)
        if isinstance(block.ffn, MoE) and {"experts", "expert_weights"} & self._points:
            hook = block.ffn.register_forward_hook(lambda ffn, inputs, output: self._route(layer, ffn, inputs[0]))
            self._handles.append(hook)

    @torch.no_grad()
    def _route(self, layer: int, ffn: nn.Module, x_BTD: Tensor) -> None:
        weights_NK, ids_NK, _ = cast(MoE, ffn).router(x_BTD.flatten(0, 1))
        found: dict[Point, Tensor] = {"experts": ids_NK, "expert_weights": weights_NK}
        for point, value in found.items():
            if point in self._points:
                self._seen[point, layer] = value.unflatten(0, x_BTD.shape[:2]).detach()


def _itself(output: Tensor) -> Tensor:
    return output


def _fed(output: Tensor | Routed) -> Tensor:
    return output.output if isinstance(output, Routed) else output
