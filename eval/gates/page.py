"""Gates of many documents as a page: the score of every layer and stream, and their heat maps in its order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram.report.figure import SavedFigure, new_figure, save
from engram.report.heat import heat_rows, heat_scale
from engram.report.page import Page
from engram.report.style import COLOURS, INK, MUTED, applied
from eval.gates.reading import GateReading
from eval.gates.table import StreamSummary

Columns = dict[str, list[object]]

SCORE = (
    "Layers and streams stand in the order of one score, fixed beforehand: the probability that the gate is wider "
    "open at the final token of a name than at a token outside of names whose position lies in the same octave (0.5: "
    "it does not tell them apart). The bars are 90 % intervals from drawing documents; where one holds 0.5, the "
    "verdict is 'not resolved'. Each is judged on its own: of many streams without any difference, one in ten would "
    "still be called higher or lower. Names are found by their capitals within sentences, and a control "
    "may be a piece of any other word, or of a name that opens a sentence: the score says that a gate follows such "
    "tokens, not that it knows names."
)
SCALE = (
    "A gate has no scale of its own: a wide-open gate on a small value adds little. |gate x value| and the size of the "
    "memory's output against its stream tell how much it adds."
)


def summary_columns(summaries: Sequence[StreamSummary], num_final: int, num_outside: int) -> Columns:
    """The summaries as a table, in their order."""
    columns: Columns = {"rank": [rank + 1 for rank in range(len(summaries))]}
    for name in ("layer", "stream"):
        columns[name] = [getattr(one, name) for one in summaries]
    columns |= {
        "auc": [_known(one.auc.value) for one in summaries],
        "auc_low": [_known(one.auc.low) for one in summaries],
        "auc_high": [_known(one.auc.high) for one in summaries],
        "verdict": [one.auc.verdict for one in summaries],
        "entities": [num_final] * len(summaries),
        "controls": [num_outside] * len(summaries),
    }
    for name in ("gate_mean", "gate_sd", "gate_p10", "gate_p50", "gate_p90", "open_share"):
        columns[name] = [getattr(one, name) for one in summaries]
    columns["gated_value_mean"] = [one.value_mean for one in summaries]
    columns["relative_output_mean"] = [one.relative_mean for one in summaries]
    columns["rows_norm_mean"] = [one.rows_mean for one in summaries]
    return columns


def gates_figure(summaries: Sequence[StreamSummary], columns: Columns, folder: Path) -> SavedFigure:
    """Score with interval, and the spread of the gate, of each layer and stream."""
    places = np.arange(len(summaries))
    with applied():
        figure, (left, right) = new_figure(1, 2, height=1.0 + 0.24 * len(summaries))
        left.axvline(0.5, color=MUTED[0], linestyle=(0, (4, 3)), linewidth=1)
        for place, one in zip(places, summaries, strict=True):
            colour = MUTED[0] if one.auc.verdict == "not resolved" else COLOURS[0]
            left.plot([one.auc.low, one.auc.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            left.plot(one.auc.value, place, marker="o", color=colour, markersize=4.5)
            right.plot([one.gate_p10, one.gate_p90], [place, place], color=COLOURS[2], linewidth=2.5, alpha=0.6)
            right.plot(one.gate_p50, place, marker="|", color=INK[0], markersize=8)
            right.plot(one.gate_mean, place, marker="o", color=COLOURS[2], markersize=4.5)
        left.set_xlabel("AUC of the gate: final tokens of names")
        right.set_xlabel("gate: 10 to 90 % of tokens, median, mean")
        right.set_xlim(0, 1)
        for axis in (left, right):
            axis.set_yticks(places, [f"layer {one.layer}, stream {one.stream}" for one in summaries])
            axis.set_ylim(len(summaries) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
        right.tick_params(labelleft=False)
        return save(figure, columns, folder, "gates_by_stream")


def collision_rows(
    shared_LNH: npt.NDArray[np.int64], layers: Sequence[int], orders: Sequence[int], num_heads: int
) -> list[list[str]]:
    """For each layer and order: positions whose n-gram shares a row, shares all rows, and n-grams on a row it reads."""
    rows = []
    for layer, shared_NH in zip(layers, shared_LNH, strict=True):
        for place, order in enumerate(orders):
            mine_Nh = shared_NH[:, place * num_heads : (place + 1) * num_heads]
            any_share, all_share = (mine_Nh > 1).any(1).mean(), (mine_Nh > 1).all(1).mean()
            cells = [f"{any_share:.1%}", f"{all_share:.1%}", f"{mine_Nh.mean():.2f}"]
            rows.append([f"layer {layer}, order {order}", *cells])
    return rows


def heat_map(reading: GateReading, summaries: Sequence[StreamSummary], document: int, texts: Sequence[str]) -> str:
    """HTML of one document's tokens, a row for each layer and stream in the order of the score."""
    here = np.flatnonzero(reading.document_N == document)
    labels, values, titles = [], [], []
    for one in summaries:
        row = reading.layers.index(one.layer)
        gate, value, relative = (
            array[row, here, one.stream].tolist()
            for array in (reading.gate_LNG, reading.value_LNG, reading.relative_LNG)
        )
        labels.append(f"layer {one.layer}, stream {one.stream}: AUC {one.auc.value:.2f}")
        values.append(gate)
        titles.append(
            [
                f"gate {g:.3f}, |gate x value| {v:.3f}, adds {r:.3f} of the stream"
                for g, v, r in zip(gate, value, relative, strict=True)
            ]
        )
    return heat_rows(labels, [texts[token] for token in reading.token_N[here].tolist()], values, titles)


def build_page(
    subtitle: str,
    reading: GateReading,
    summaries: Sequence[StreamSummary],
    figure: SavedFigure,
    columns: Columns,
    shared: Sequence[Sequence[str]],
    texts: Sequence[str],
    show: int,
) -> Page:
    """All layers and streams, on the first `show` documents."""
    page = Page("Memory gates", subtitle)
    page.section("Every layer and stream", SCORE)
    page.figure(figure, f"{columns['entities'][0]:,} names, {columns['controls'][0]:,} tokens outside of names. ")
    page.text(SCALE)
    kept = [name for name in columns if name not in ("entities", "controls", "gate_p10", "gate_p90", "gate_sd")]
    rows = zip(*(columns[name] for name in kept), strict=True)
    page.table([name.replace("_", " ") for name in kept], [[_shown(cell) for cell in row] for row in rows])
    page.section(
        "Collisions",
        "How often another n-gram of these same documents reads the same row. With more text there are more: the "
        "numbers describe this set, not the table.",
    )
    page.table(["", "shares a row", "shares every head's row", "n-grams on a row, mean"], shared)
    page.section("Heat maps", "The first documents of the set, in their order; the background is the gate.")
    page.html(heat_scale())
    for document in range(min(show, int(reading.document_N[-1]) + 1)):
        page.heading(f"Document {document}")
        page.html(heat_map(reading, summaries, document, texts))
    return page


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _shown(cell: object) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
