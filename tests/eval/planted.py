"""Models in which a test knows the depth at which things happen."""

from collections.abc import Callable

import torch
from torch import Tensor

from engram.model.transformer import Block, Transformer
from tests.eval.models import build


def lively(scale: float = 0.5, **changes: object) -> Transformer:
    """A tiny model whose every parameter is drawn wide, so that its blocks differ and its predictions are sharp."""
    model = build(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def plain(num_layers: int) -> Transformer:
    """One residual stream, no memory and no experts."""
    return lively(num_layers=num_layers, hyper_connection=None, memory=None, moe=None)


def plant(model: Transformer, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Block `layer` maps the streams [B, T, G, D] by `change`, whatever its weights say."""
    block = model.blocks[layer]
    assert isinstance(block, Block) and block.memory is None
    block.attn_connection.forward = lambda x, sublayer: x
    block.ffn_connection.forward = lambda x, sublayer: change(x)


def documents(lengths: tuple[int, ...] = (9, 2, 17, 5), vocab_size: int = 50) -> list[list[int]]:
    return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]
