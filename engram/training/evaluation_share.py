"""What a rank evaluates of a batch that all ranks know."""

from typing import NamedTuple

import torch
from torch import Tensor

from engram.distributed.world import World
from engram.model.evaluation import TokenBatch
from engram.model.transformer import IGNORE


class Share(NamedTuple):
    """A TokenBatch."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None


def share_of(batch: TokenBatch, world: World) -> Share:
    """This rank's sequences. All ranks have equally many, because a forward pass may take all ranks; what fills up a
    share has no targets.
    """
    each = -(-len(batch.tokens) // world.size)
    first = world.rank * each
    places = torch.arange(first, first + each)
    real = places < len(batch.tokens)
    places = places.clamp(max=len(batch.tokens) - 1)
    targets = batch.targets[places].masked_fill(~real[:, None], IGNORE)
    return Share(batch.tokens[places], targets, None if batch.document_ids is None else batch.document_ids[places])
