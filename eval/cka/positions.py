"""Which tokens of which texts are compared, in what order and batches; and a model's states there.

Legend: N positions, n of one part of them, B rows, T tokens, G residual streams, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.config import UserError
from engram.model.transformer import Transformer
from eval.capture import Capture
from eval.padding import padded_batches
from eval.points import Point
from eval.states import batch_tokens, merged_states

Ints = npt.NDArray[np.int64]

# Points with a state in every block, and those among them that have residual streams.
STREAM_POINTS: tuple[Point, ...] = ("resid_post", "resid_mid", "resid_memory", "resid_pre")
POINTS: tuple[Point, ...] = (*STREAM_POINTS, "attn_out", "ffn_out")


@dataclass(frozen=True)
class Positions:
    """Token `position_N[n]` of `rows[row_N[n]]` is of unit `unit_N[n]`; units 0, 1, ... are what bootstraps draw."""

    rows: list[list[int]]
    row_N: Ints
    position_N: Ints
    unit_N: Ints

    @property
    def units(self) -> int:
        return int(self.unit_N.max()) + 1


def all_positions(documents: Sequence[Sequence[int]]) -> Positions:
    """Every token of the documents, which are the units: tokens of one document are not independent."""
    lengths = [len(document) for document in documents]
    row_N = np.repeat(np.arange(len(documents)), lengths)
    position_N = np.concatenate([np.arange(length) for length in lengths])
    return Positions([list(document) for document in documents], row_N, position_N, row_N)


def shuffled_batches(positions: Positions, batch: int, held: int, seed: int) -> Iterator[list[Ints]]:
    """All positions in batches of about equal size, `batch` at least; each list is of at most about `held` positions.

    Rows are in random order, and positions are in random order within a list: a batch mixes what is held at once, and
    no row is read for more than two lists. The order depends on the positions and the seed alone, never on a model.
    """
    generator = np.random.default_rng(seed)
    place_of_row = generator.permutation(len(positions.rows))
    order_N = np.argsort(place_of_row[positions.row_N], kind="stable")
    sizes = [len(part) for part in np.array_split(order_N, max(1, len(order_N) // batch))]
    together = max(1, held // sizes[0])
    start = 0
    for first in range(0, len(sizes), together):
        group = sizes[first : first + together]
        mixed = generator.permutation(order_N[start : start + sum(group)])
        yield np.split(mixed, np.cumsum(group)[:-1])
        start += sum(group)


def check_stream(model: Transformer, point: Point, stream: int | None) -> None:
    """Raise UserError where the model has no such residual stream, or the point has none."""
    if stream is None:
        return
    if point not in STREAM_POINTS:
        raise UserError(f"--stream {stream}: {point} has no residual streams: leave it away, or give another --point")
    streams = model.config.hc_mult
    if stream >= streams:
        raise UserError(
            f"--stream {stream}: the model has {streams} residual streams: give merged or 0 to {streams - 1}"
        )


@torch.inference_mode()
def read_states(
    model: Transformer,
    positions: Positions,
    chosen_n: Ints,
    point: Point = "resid_post",
    stream: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """States of all layers at some positions, float32 [L, n, D] on the model's device, in the order of `chosen_n`.

    `stream` None: merged as the model merges its streams in the end. Rows are cut behind their last chosen position.
    `advance` hears how many tokens were read.
    """
    device, layers = model.head.weight.device, model.config.num_layers
    rows_R, local_n = np.unique(positions.row_N[chosen_n], return_inverse=True)
    position_n = positions.position_N[chosen_n]
    ends_R = np.zeros(len(rows_R), np.int64)
    np.maximum.at(ends_R, local_n, position_n + 1)
    rows = [positions.rows[row][:end] for row, end in zip(rows_R.tolist(), ends_R.tolist(), strict=True)]
    # Chosen places of row r are by_row[starts[r] : starts[r + 1]].
    by_row = np.argsort(local_n, kind="stable")
    starts = np.searchsorted(local_n[by_row], np.arange(len(rows) + 1))
    found_LnD = torch.zeros(layers, len(chosen_n), model.config.hidden_size, device=device)
    with Capture(model, [point]) as seen:
        for batch in padded_batches(rows, batch_tokens(model.config, layers), device):
            seen.clear()
            model.hidden(batch.tokens_BT)
            places = [by_row[starts[row] : starts[row + 1]] for row in batch.indices]
            where = np.concatenate(places)
            row_B = torch.from_numpy(np.repeat(np.arange(len(places)), [len(part) for part in places])).to(device)
            token_B = torch.from_numpy(position_n[where]).to(device)
            index = torch.from_numpy(where).to(device)
            for layer in range(layers):
                x = seen[point, layer][row_B, token_B]
                found_LnD[layer, index] = (_state(model, x, stream) if point in STREAM_POINTS else x).float()
            advance(int(batch.real_BT.sum()))
    return found_LnD


def _state(model: Transformer, x_nGD: Tensor, stream: int | None) -> Tensor:
    return merged_states(model, x_nGD) if stream is None else x_nGD[:, stream]
