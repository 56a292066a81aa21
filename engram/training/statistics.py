"""What single layers do: expert loads, gates, rows touched, hyper-connection mixing, table gradients.

Nothing of it runs between the steps that ask for it: one extra forward pass without gradients, in eval mode and not
compiled, over the step's first micro-batch, with hooks that are gone afterwards. All values are of the weights before
the update. Keys, for layer 1 and stream 0:

    layer_01/router_max_load   load of the busiest expert / mean load (1: perfectly even)
    layer_01/router_entropy    entropy of the loads / log(number of experts) (1: perfectly even)
    layer_01/gate_mean_0       mean gate;  gate_low_0, gate_high_0: shares of tokens with a gate < 0.05, > 0.95
    layer_01/rows_touched      distinct rows that were read / rows of the table; also over_encoding/rows_touched
    layer_01/row_grad_norm     norm of the table's gradient, after clipping; also over_encoding/row_grad_norm
    layer_01/attn_mix_gain     largest sum of |h_res| over a row (forward gain) or a column (backward gain), any token;
                               ffn_mix_gain, memory_mix_gain (fusion: single) likewise
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram.memory.engram import Engram
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable
from engram.model.evaluation import TokenBatch, to_device
from engram.model.hyper_connection import HyperConnection
from engram.model.moe import MoE, Router
from engram.model.transformer import Block, Transformer

LOW, HIGH = 0.05, 0.95


@torch.no_grad()
def layer_statistics(
    model: Transformer, batch: TokenBatch, micro_batch_size: int, device: torch.device
) -> dict[str, float]:
    """Statistics of every layer over the first micro-batch; gradients are those that the step left."""
    collected: dict[str, Tensor] = {}
    handles = [handle for prefix, part in _parts(model) for handle in _watch(part, prefix, collected)]
    training = model.training
    model.eval()
    try:
        tokens, _, document_ids = to_device(batch, device)
        with torch.compiler.set_stance("force_eager"):
            model.hidden(tokens[:micro_batch_size], None if document_ids is None else document_ids[:micro_batch_size])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    # One transfer for all values.
    values = torch.stack([value.float() for value in collected.values()]).tolist() if collected else []
    return dict(zip(collected, values, strict=True))


def router_statistics(expert_ids_TK: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Evenness of the experts' loads."""
    load = torch.bincount(expert_ids_TK.flatten(), minlength=num_experts).double()
    share = load / load.sum()
    return {
        "router_max_load": share.max() * num_experts,
        "router_entropy": torch.special.entr(share).sum() / math.log(num_experts) if num_experts > 1 else share.sum(),
    }


def gate_statistics(gates_BTG: Tensor) -> dict[str, Tensor]:
    """How far each stream opens to memory."""
    statistics = {}
    for stream, gates in enumerate(gates_BTG.flatten(0, 1).unbind(-1)):
        statistics[f"gate_mean_{stream}"] = gates.mean()
        statistics[f"gate_low_{stream}"] = (gates < LOW).float().mean()
        statistics[f"gate_high_{stream}"] = (gates > HIGH).float().mean()
    return statistics


def table_statistics(hash_ids: Tensor, num_rows: int, gradient: Tensor | None) -> dict[str, Tensor]:
    """Share of the table that the batch reads, and the gradient that the step left on it (on this rank's rows)."""
    rows = torch.unique(hash_ids)
    # -1 marks a dead token, which reads no row.
    statistics = {"rows_touched": (rows >= 0).sum() / num_rows}
    if gradient is not None:
        statistics["row_grad_norm"] = gradient_norm(gradient)
    return statistics


def mix_gain(h_res_BTGG: Tensor) -> Tensor:
    """Largest absolute row or column sum of any token's mixing matrix: 1 where it is doubly stochastic."""
    absolute = h_res_BTGG.abs()
    return torch.maximum(absolute.sum(-1).max(), absolute.sum(-2).max())


def gradient_norm(gradient: Tensor) -> Tensor:
    """Norm of a dense or sparse gradient."""
    return torch.linalg.vector_norm(gradient.coalesce().values() if gradient.is_sparse else gradient)


def _parts(model: Transformer) -> Iterator[tuple[str, nn.Module | None]]:
    if model.over_encoding is not None:
        yield "over_encoding/", model.over_encoding.embed
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"layer_{layer:02d}/"
        yield prefix, block.memory
        yield prefix, None if block.memory is None else block.memory.embed
        yield prefix, block.ffn.router if isinstance(block.ffn, MoE) else None
        yield prefix + "memory_", block.memory_connection
        yield prefix + "attn_", block.attn_connection
        yield prefix + "ffn_", block.ffn_connection


def _watch(part: nn.Module | None, prefix: str, collected: dict[str, Tensor]) -> list[RemovableHandle]:
    """A hook that keeps the statistics of `part`'s next call; none on parts that have none."""

    def statistics(inputs: tuple[Tensor, ...], output: Any) -> dict[str, Tensor]:
        match part:
            case RowTable():
                return table_statistics(inputs[0], len(part.weight), part.weight.grad)
            case StagedTable():
                return table_statistics(inputs[0], part.num_rows, part.weight.grad)
            case Engram():
                return gate_statistics(part.gates(*inputs))
            case Router():
                return router_statistics(output[1], part.config.num_experts)
            case HyperConnection():
                return {"mix_gain": mix_gain(part.coefficients(inputs[0])[2])}
        raise AssertionError(part)

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        collected.update({prefix + key: value for key, value in statistics(inputs, output).items()})

    if isinstance(part, RowTable | StagedTable | Engram | Router | HyperConnection):
        return [part.register_forward_hook(keep)]
    return []
