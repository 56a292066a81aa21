"""Every initialiser, in one table.

| parameter                                        | initial value                                             |
|--------------------------------------------------|-----------------------------------------------------------|
| embedding, head, projections, router, experts    | N(0, model.init_std)                                      |
| outputs of sublayers (o_proj, down)              | N(0, model.init_std / sqrt(2 num_layers))                 |
| n-gram tables                                    | N(0, memory.init_std)                                     |
| memory projection wkv, over_encoding.proj        | N(0, model.init_std)                                      |
| hyper-connection and readout weights             | N(0, model.init_std), times the gate factor               |
| hyper-connection and readout biases, gate factor | near the identity (model/hyper_connection.py)             |
| norm gains                                       | 1 (0 if stored as the difference from 1)                  |
| memory convolution                               | 0 (N(0, 1 / sqrt(kernel_size)) if zero_init is off)       |
| biases                                           | 0                                                         |
"""

import torch
from torch import nn

from engram.config import ModelConfig
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable
from engram.model.hyper_connection import HyperConnection, Readout


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig) -> None:
    """Set every parameter of a Transformer, in the order of their names: one torch seed gives one model."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for module in model.modules():
        if isinstance(module, HyperConnection | Readout):
            module.bias.copy_(module.initial_bias())
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, RowTable | StagedTable):
            # Which may hold some of its rows only.
            owner.draw_rows(_table_std(name, config))
        else:
            _init(name, parameter, config)


def _table_std(name: str, config: ModelConfig) -> float:
    settings = config.over_encoding if name.startswith("over_encoding.") else config.memory
    assert settings is not None
    return settings.init_std


def _init(name: str, parameter: nn.Parameter, config: ModelConfig) -> None:
    owner, _, leaf = name.rpartition(".")
    part = owner.rpartition(".")[2]
    memory = config.memory
    if part == "memory" and leaf in ("q_weight", "k_weight", "conv_norm") and memory:
        parameter.fill_(0.0 if memory.zero_centred_gains else 1.0)
    elif name.endswith("memory.conv.weight") and memory and memory.conv:
        if memory.conv.zero_init:
            parameter.zero_()
        else:
            parameter.normal_(std=memory.conv.kernel_size**-0.5)
    elif part.endswith("norm"):
        parameter.fill_(1.0)
    elif part == "wkv" and leaf == "bias":
        parameter.zero_()
    elif part == "o_proj" or part == "down" or leaf == "down":
        parameter.normal_(std=config.init_std / (2 * config.num_layers) ** 0.5)
    elif leaf in ("weight", "gate_up"):
        parameter.normal_(std=config.init_std)
    else:
        # Scale and bias of hyper-connections and the readout were set by their modules.
        assert leaf in ("scale", "bias"), name
