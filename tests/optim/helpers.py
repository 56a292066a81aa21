"""Parameters, assignments and sparse gradients for the tests of the optimizer."""

import torch
from torch import Tensor, nn

from engram.optim.groups import Assignment, RoleName


def assign(
    name: str, value: Tensor, role: RoleName = "adamw", lr_multiplier: float = 1.0, weight_decay: float = 0.0
) -> Assignment:
    return Assignment(name, nn.Parameter(value.clone()), role, lr_multiplier, weight_decay)


def sparse_gradient(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, (num_rows, values.shape[1]), check_invariants=True)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def random_sparse_gradient(num_rows: int, width: int, reads: int, generator: torch.Generator) -> Tensor:
    """`reads` reads of random rows, many of them repeated."""
    rows = torch.randint(num_rows, (reads,), generator=generator)
    return sparse_gradient(rows, torch.randn(reads, width, generator=generator), num_rows)


Shapes = dict[str, tuple[int, ...]]


def model_shapes(memory: bool = True, experts: bool = True, hyper_connections: bool = True) -> Shapes:
    """Names and shapes of the parameters of a two-block model: block 0 is dense, block 1 has experts and memory."""
    width, streams = 6, 2 if hyper_connections else 1
    shapes: Shapes = {"embed.weight": (11, width), "head.weight": (11, width), "norm.weight": (width,)}
    mixing = 2 * streams + streams * streams
    connection = {"weight": (mixing, streams * width), "scale": (3,), "bias": (mixing,)}
    if hyper_connections:
        shapes |= {"readout.weight": (streams, streams * width), "readout.scale": (1,), "readout.bias": (streams,)}
    if memory:
        shapes |= {"over_encoding.embed.weight": (29, 3), "over_encoding.proj.weight": (width, 12)}
        shapes |= {
            "blocks.1.memory.embed.weight": (31, 3),
            "blocks.1.memory.wkv.weight": ((streams + 1) * width, 12),
            "blocks.1.memory.wkv.bias": ((streams + 1) * width,),
            "blocks.1.memory.q_weight": (streams, width),
            "blocks.1.memory.k_weight": (streams, width),
            "blocks.1.memory.conv.weight": (streams * width, 1, 4),
            "blocks.1.memory.conv_norm": (streams, width),
        }
        if hyper_connections:
            shapes |= {f"blocks.1.memory_connection.{name}": shape for name, shape in connection.items()}
    for block in (0, 1):
        prefix = f"blocks.{block}"
        if hyper_connections:
            for part in ("attn_connection", "ffn_connection"):
                shapes |= {f"{prefix}.{part}.{name}": shape for name, shape in connection.items()}
        shapes |= {
            f"{prefix}.attn_norm.weight": (width,),
            f"{prefix}.ffn_norm.weight": (width,),
            f"{prefix}.attn.q_a_proj.weight": (5, width),
            f"{prefix}.attn.q_a_norm.weight": (5,),
            f"{prefix}.attn.q_b_proj.weight": (12, 5),
            f"{prefix}.attn.kv_a_proj.weight": (7, width),
            f"{prefix}.attn.kv_a_norm.weight": (5,),
            f"{prefix}.attn.kv_b_proj.weight": (14, 5),
            f"{prefix}.attn.o_proj.weight": (width, 8),
        }
        if experts and block == 1:
            shapes |= {
                f"{prefix}.ffn.router.weight": (3, width),
                f"{prefix}.ffn.experts.gate_up": (3, 2, 9, width),
                f"{prefix}.ffn.experts.down": (3, width, 9),
                f"{prefix}.ffn.shared.gate_up.weight": (2, 7, width),
                f"{prefix}.ffn.shared.down.weight": (width, 7),
            }
        else:
            shapes |= {f"{prefix}.ffn.gate_up.weight": (2, 13, width), f"{prefix}.ffn.down.weight": (width, 13)}
    return shapes


def model_parameters(shapes: Shapes, generator: torch.Generator) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(parameters: dict[str, nn.Parameter], generator: torch.Generator, device: str = "cpu") -> None:
    """Random gradients: sparse with repeated rows for n-gram tables, dense for the rest."""
    for name, parameter in parameters.items():
        if name.endswith("memory.embed.weight") or name == "over_encoding.embed.weight":
            gradient = random_sparse_gradient(parameter.shape[0], parameter.shape[1], 17, generator)
        else:
            gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(device)
