"""What a run is made of: where a model's parts lie before DeepSpeed takes them; what the log tells of the processor."""

from collections.abc import Callable

import pytest
import torch

from engram.config import Config
from engram.kernels import products
from engram.model.transformer import Transformer
from engram.training.setup import move_around_backbone
from engram.training.trainer import Trainer

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


@pytest.mark.parametrize("lacking", [True, False])
def test_the_log_tells_of_widened_products(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: bool
) -> None:
    monkeypatch.setattr(products, "_cpu_lacks_bfloat16", lambda: lacking)
    for dtype, said in (("bfloat16", lacking), ("float32", False)):
        caplog.clear()
        with caplog.at_level("INFO"):
            Trainer(make_config(dtype, train={"dtype": dtype, "stop_after": 1})).fit()
        assert ("products of bfloat16 matrices run in float32" in caplog.text) is said
