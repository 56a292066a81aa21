"""The long table of gates, and one line about each layer and stream.

Legend: N positions, L memory layers, G residual streams, H columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engram.config import MemoryConfig
from eval.gates.auc import Auc, matched_auc, octave
from eval.gates.collisions import compressed, ngram_numbers, ngrams_on_rows
from eval.gates.reading import GateReading

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Entities:
    """Where names stand in the documents: `inside_N` all their tokens, `final_N` the last token of each."""

    inside_N: Bools
    final_N: Bools


@dataclass(frozen=True)
class StreamSummary:
    """One layer and stream over all positions; `auc`: its gate at names' final tokens against matched controls."""

    layer: int
    stream: int
    auc: Auc
    gate_mean: float
    gate_sd: float
    gate_p10: float
    gate_p50: float
    gate_p90: float
    open_share: float
    value_mean: float
    relative_mean: float
    rows_mean: float


def collisions(reading: GateReading, config: MemoryConfig, vocabulary_table: Ints) -> Ints:
    """How many distinct n-grams of these documents read the same row, int64 [L, N, H]; 1: no collision."""
    keys_N, pad_key = compressed(reading.token_N, config, vocabulary_table)
    numbers = ngram_numbers(keys_N, reading.position_N, config.orders, pad_key, config.look_back == "eos")
    return np.stack([ngrams_on_rows(ids_NH, numbers, config.num_heads) for ids_NH in reading.addresses_LNH])


def summarise(reading: GateReading, entities: Entities, *, level: float = 0.9, seed: int = 0) -> list[StreamSummary]:
    """All layers and streams, those first whose gates tell names best from other tokens.

    The score was chosen before looking: AUC of the gate at names' final tokens against tokens outside of names whose
    position lies in the same octave; an interval from drawing documents. Equal scores stay in the layers' order.
    """
    gates_SN = reading.gate_LNG.transpose(0, 2, 1).reshape(len(reading.series), -1)
    bins_N = octave(reading.position_N)
    # Against everything outside of names: a name's inner tokens are no controls.
    aucs = matched_auc(
        gates_SN, entities.final_N, ~entities.inside_N, bins_N, reading.document_N, level=level, seed=seed
    )
    found = []
    for place, ((layer, stream), auc) in enumerate(zip(reading.series, aucs, strict=True)):
        row, gate_N = reading.layers.index(layer), gates_SN[place]
        p10, p50, p90 = np.quantile(gate_N, [0.1, 0.5, 0.9]).tolist()
        found.append(
            StreamSummary(
                layer=layer,
                stream=stream,
                auc=auc,
                gate_mean=float(gate_N.mean(dtype=np.float64)),
                gate_sd=float(gate_N.std(dtype=np.float64)),
                gate_p10=p10,
                gate_p50=p50,
                gate_p90=p90,
                open_share=float((gate_N > 0.5).mean()),
                value_mean=float(reading.value_LNG[row, :, stream].mean(dtype=np.float64)),
                relative_mean=float(reading.relative_LNG[row, :, stream].mean(dtype=np.float64)),
                rows_mean=float(reading.rows_LN[row].mean(dtype=np.float64)),
            )
        )
    return sorted(found, key=lambda one: -one.auc.value if one.auc.value == one.auc.value else np.inf)


def long_table(
    reading: GateReading, entities: Entities, shared_LNH: Ints, texts: Sequence[str], orders: Sequence[int]
) -> pa.Table:
    """One row for each position, layer and stream; `texts` are the vocabulary's.

    `ngram_K` is the text of the last K tokens, `ngrams_on_row_K` how many distinct n-grams of these documents read its
    rows (mean over heads; 1: no collision), `colliding_heads_K` in how many heads another one does.
    """
    num_layers, num_positions, num_streams = reading.gate_LNG.shape
    each = num_layers * num_streams
    tokens, token_codes = np.unique(reading.token_N, return_inverse=True)
    place_N = entities.inside_N.astype(np.int64) + entities.final_N
    columns: dict[str, pa.Array] = {
        "document": pa.array(np.repeat(reading.document_N, each)),
        "position": pa.array(np.repeat(reading.position_N, each)),
        "token": _named(np.repeat(token_codes, each), [texts[token] for token in tokens]),
        "entity": _named(np.repeat(place_N, each), ["outside", "inside", "final"]),
        "layer": pa.array(np.tile(np.repeat(reading.layers, num_streams), num_positions)),
        "stream": pa.array(np.tile(np.arange(num_streams), num_positions * num_layers)),
        "gate": _flat(reading.gate_LNG),
        "gated_value": _flat(reading.value_LNG),
        "relative_output": _flat(reading.relative_LNG),
        "rows_norm": pa.array(np.repeat(reading.rows_LN.T.reshape(-1), num_streams)),
    }
    shared_LNOh = shared_LNH.reshape(num_layers, num_positions, len(orders), -1)
    for place, order in enumerate(orders):
        codes_N, names = _ngram_texts(reading, texts, order)
        columns[f"ngram_{order}"] = _named(np.repeat(codes_N, each), names)
        shared_NL = shared_LNOh[:, :, place].transpose(1, 0, 2)
        columns[f"ngrams_on_row_{order}"] = pa.array(np.repeat(shared_NL.mean(-1).reshape(-1), num_streams))
        colliding_NL = (shared_NL > 1).sum(-1)
        columns[f"colliding_heads_{order}"] = pa.array(np.repeat(colliding_NL.reshape(-1), num_streams))
    return pa.table(columns)


def _flat(values_LNG: npt.NDArray[np.float32]) -> pa.Array:
    return pa.array(np.ascontiguousarray(values_LNG.transpose(1, 0, 2)).reshape(-1))


def _named(codes: Ints, names: Sequence[str]) -> pa.DictionaryArray:
    """Strings that repeat, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names, pa.string()))


def _ngram_texts(reading: GateReading, texts: Sequence[str], order: int) -> tuple[Ints, list[str]]:
    """Codes [N] and texts of the n-grams that end at each position; shorter ones at a document's start."""
    ids = [np.where(reading.position_N >= back, np.roll(reading.token_N, back), -1) for back in range(order)]
    distinct, codes_N = np.unique(np.stack(ids[::-1], axis=1), axis=0, return_inverse=True)
    return codes_N.reshape(-1), ["".join(texts[token] for token in row if token >= 0) for row in distinct.tolist()]
