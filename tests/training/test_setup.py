"""What a run is made of: where the parts of a model lie before DeepSpeed takes them."""

from collections.abc import Callable

import torch

from engram.config import Config
from engram.model.transformer import Transformer
from engram.training.setup import move_around_backbone

MakeConfig = Callable[..., Config]


def test_zero_3_takes_the_backbone_from_host_memory(make_config: MakeConfig) -> None:
    config = make_config(distributed={"zero_stage": 3})
    model = Transformer(config.model)
    names, buffers = set(model.state_dict()), dict(model.named_buffers())
    assert buffers
    move_around_backbone(model, torch.device("meta"))
    assert set(model.state_dict()) == names and dict(model.named_buffers()).keys() == buffers.keys()
    assert all(buffer.is_meta for _, buffer in model.named_buffers())
    moved = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert moved == {name for name in names if name.endswith("memory.embed.weight")} != set()
