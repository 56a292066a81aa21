"""What a model does without its memory, or with a part of it changed: the modules stay, hooks change what passes.

Legend: B batch, T tokens, H columns (orders * heads), W width of one row, N positions of a reference text.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from engram.config import MemoryConfig, UserError
from engram.model.transformer import Block, Transformer
from eval.padding import padded_batches

Mode = Literal["zero_embedding", "zero_output", "gate_one", "mean", "shuffled"]
MODES: tuple[Mode, ...] = get_args(Mode)
# A gate and an output belong to all columns together: these modes know whole layers only.
WHOLE_LAYER: tuple[Mode, ...] = ("zero_output", "gate_one")
# Rows of a reference text take the place of the model's own.
NEED_REFERENCE: tuple[Mode, ...] = ("mean", "shuffled")
# Odd: products of int64 wrap around, which spreads the bits and loses none.
_MIX = 0x9E3779B97F4A7C1


@dataclass(frozen=True)
class Reference:
    """What a text makes each memory layer read: addresses int64 [N, H] of its positions, and the mean row [H, W]."""

    addresses: dict[int, Tensor]
    means: dict[int, Tensor]


@torch.inference_mode()
def read_reference(model: Transformer, documents: Sequence[Sequence[int]], max_tokens: int = 8192) -> Reference:
    """The addresses that `documents` read, each on its own, and the means of their rows in float32.

    Raises UserError for a model without memory.
    """
    config = memory_of(model)
    device = model.head.weight.device
    found: dict[int, list[Tensor]] = {layer: [] for layer in config.layer_ids}
    for batch in padded_batches(documents, max_tokens, device):
        for layer, ids_BTH in model.hash_ids(batch.tokens_BT).items():
            found[layer].append(ids_BTH[batch.real_BT])
    addresses = {layer: torch.cat(parts) for layer, parts in found.items()}
    return Reference(addresses, {layer: _mean_rows(model, layer, ids_NH) for layer, ids_NH in addresses.items()})


@contextmanager
def intervened(
    model: Transformer,
    mode: Mode,
    *,
    layers: Sequence[int] | None = None,
    orders: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    reference: Reference | None = None,
) -> Iterator[None]:
    """Inside the context, the memory layers of `model` work as `mode` says; afterwards the model is as it was.

    | mode | what changes | parts of a layer |
    |---|---|---|
    | `zero_embedding` | the rows read are zero; with a projection bias, the output is not | orders, heads |
    | `mean` | each column reads its mean row over the `reference` | orders, heads |
    | `shuffled` | each n-gram reads the rows of another, drawn from the `reference`'s positions | orders, heads |
    | `gate_one` | every stream takes the whole value | none |
    | `zero_output` | nothing is added, after gate and convolution | none |

    None of `layers`, `orders` (2 for bigrams, ...) and `heads` (from 0, within each order) means all of them.
    `shuffled` draws by the n-gram's own address: an n-gram reads the same rows wherever it stands, so that no score
    depends on its batch, its padding or a cache; frequent rows are drawn as often as they are read, which keeps the
    norms' statistics. Both `mean` and `shuffled` leave the model's tables alone.

    `zero_output` with `fusion: single` still mixes the streams as the memory's connection does.

    Raises UserError: unknown mode; no memory; a layer, order or head that it lacks; parts of a layer with a mode that
    knows none; `gate_one` without a gate; `mean` or `shuffled` without a reference.
    """
    config = memory_of(model)
    check(config, mode, layers, orders, heads)
    if mode in NEED_REFERENCE and reference is None:
        raise UserError(f"mode {mode} puts rows of another text in place of the model's own: give a reference")
    columns = _columns(config, orders, heads)
    with ExitStack() as undo:
        for layer in config.layer_ids if layers is None else layers:
            memory = cast(Any, cast(Block, model.blocks[layer]).memory)
            if mode == "gate_one":
                undo.callback(setattr, memory, "config", memory.config)
                memory.config = memory.config.model_copy(update={"gate": None})
            elif mode == "zero_output":
                undo.callback(memory.register_forward_hook(lambda _, inputs, out: torch.zeros_like(out)).remove)
            elif mode == "shuffled":
                assert reference is not None
                redirect = _redirect(reference.addresses[layer], config.num_heads, columns)
                undo.callback(memory.embed.register_forward_pre_hook(redirect).remove)
            else:
                rows = torch.zeros(1) if mode == "zero_embedding" else cast(Reference, reference).means[layer]
                undo.callback(memory.embed.register_forward_hook(_replace(rows, config.head_dim, columns)).remove)
        yield


def check(
    config: MemoryConfig,
    mode: str,
    layers: Sequence[int] | None = None,
    orders: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> None:
    """Raise UserError for what `intervened` cannot do to a memory of this geometry."""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.4)
        raise UserError(
            f"there is no mode {mode!r}{f': did you mean {near[0]!r}?' if near else ''} (modes: {', '.join(MODES)})"
        )
    _check_known("layer", layers, config.layer_ids, "memory stands in layers")
    _check_known("order", orders, config.orders, "n-grams have the orders")
    _check_known("head", heads, range(config.num_heads), "each order has the heads")
    if mode in WHOLE_LAYER and (orders is not None or heads is not None):
        raise UserError(
            f"mode {mode} changes what all orders and heads of a layer make together: leave them out, or choose among "
            f"{', '.join(name for name in MODES if name not in WHOLE_LAYER)}"
        )
    if mode == "gate_one" and config.gate is None:
        raise UserError("mode gate_one opens gates, but this model has none (model.memory.gate is null): leave it out")


def memory_of(model: Transformer) -> MemoryConfig:
    """The settings of the model's memory. Raises UserError where it has none."""
    if model.config.memory is None:
        raise UserError("this model has no memory to switch off (model.memory is null): give a checkpoint with memory")
    return model.config.memory


def _check_known(what: str, given: Sequence[int] | None, known: Sequence[int], where: str) -> None:
    for number in given or ():
        if number not in known:
            raise UserError(f"{what} {number} has no memory to change: {where} {', '.join(map(str, known))}")


def _columns(config: MemoryConfig, orders: Sequence[int] | None, heads: Sequence[int] | None) -> Tensor:
    """Which columns are meant, bool [H]."""
    order_H = torch.tensor(list(config.orders)).repeat_interleave(config.num_heads)
    head_H = torch.arange(config.num_heads).repeat(len(config.orders))
    of_order = torch.isin(order_H, torch.tensor(list(config.orders if orders is None else orders)))
    return of_order & torch.isin(head_H, torch.tensor(list(range(config.num_heads) if heads is None else heads)))


def _replace(rows: Tensor, width: int, columns_H: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(_: Any, inputs: tuple[Tensor, Any], rows_BTM: Tensor) -> Tensor:
        rows_BTHW = rows_BTM.unflatten(-1, (-1, width))
        other = rows.to(rows_BTHW.device, rows_BTHW.dtype).expand_as(rows_BTHW)
        # A dead token reads nothing, whatever its rows are replaced by.
        chosen_BTH = columns_H.to(rows_BTHW.device) & (inputs[0] >= 0)
        return torch.where(chosen_BTH.unsqueeze(-1), other, rows_BTHW).flatten(-2)

    return hook


def _redirect(addresses_NH: Tensor, num_heads: int, columns_H: Tensor) -> Callable[[Any, Any], tuple[Tensor, Any]]:
    def hook(_: Any, inputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        ids_BTH, dtype = inputs
        donors_NH, columns = addresses_NH.to(ids_BTH.device), columns_H.to(ids_BTH.device)
        # All heads of an n-gram go to one other n-gram, which their addresses choose together.
        place_BTO = _spread(ids_BTH.unflatten(-1, (-1, num_heads))) % len(donors_NH)
        place_BTH = place_BTO.repeat_interleave(num_heads, dim=-1)
        other_BTH = donors_NH.gather(0, place_BTH.flatten(0, 1)).view_as(ids_BTH)
        return torch.where(columns & (ids_BTH >= 0), other_BTH, ids_BTH), dtype

    return hook


def _spread(ids: Tensor) -> Tensor:
    """A number from 0 to 2^31 - 1 for each n-gram, from the addresses [..., heads] of its heads."""
    state = torch.zeros_like(ids[..., 0])
    for head in range(ids.shape[-1]):
        state = (state ^ ids[..., head]) * _MIX
        state = state ^ (state >> 29)
    return (state >> 7) & 0x7FFFFFFF


def _mean_rows(model: Transformer, layer: int, addresses_NH: Tensor) -> Tensor:
    table = cast(Any, cast(Block, model.blocks[layer]).memory).embed
    total, chunk = 0.0, 1 << 14
    for start in range(0, len(addresses_NH), chunk):
        rows_NHW = table(addresses_NH[start : start + chunk], torch.float32).unflatten(-1, (addresses_NH.shape[1], -1))
        total = total + rows_NHW.sum(0, dtype=torch.float64)
    return (cast(Tensor, total) / len(addresses_NH)).float()
