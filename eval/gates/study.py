"""Gates over many documents: the long table, a score for every layer and stream, and the page of all of them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from engram.data.shards import Dataset
from engram.training.provenance import origin
from eval.documents import read_documents
from eval.gates.entities import mark_names
from eval.gates.page import build_page, collision_rows, gates_figure, summary_columns
from eval.gates.reading import read_gates
from eval.gates.table import collisions, long_table, summarise
from eval.gates.text import token_texts
from eval.loading import Loaded
from eval.output import write_provenance, writing_into


def study(loaded: Loaded, dataset: Dataset, out: Path, num_documents: int, length: int, show: int) -> Iterator[str]:
    """Measure the first documents of a split, each cut after `length` tokens, and write all into `out`.

    `gates.parquet`, `gates_by_stream.{csv,png,pdf,svg}`, `gates.html` with heat maps of the first `show` documents, and
    `provenance.json`; -> lines for the terminal. Raises UserError: no gates, no documents, a place that cannot be
    written.
    """
    # No more tokens than that many documents can have: the split may be far larger.
    documents = read_documents(dataset, length, num_documents * length)[:num_documents]
    reading = read_gates(loaded.model, documents)
    memory = loaded.config.model.memory
    assert memory is not None
    texts = token_texts(loaded.tokenizer, range(loaded.tokenizer.vocab_size))
    names = mark_names(documents, loaded.tokenizer)
    shared = collisions(reading, memory, loaded.model.vocabulary.table)
    summaries = summarise(reading, names)
    columns = summary_columns(summaries, int(names.final_N.sum()), int((~names.inside_N).sum()))
    subtitle = (
        f"{loaded.folder}, step {loaded.step:,}: {len(documents):,} documents of {dataset.folder} ({dataset.split}), "
        f"{len(reading.token_N):,} tokens"
    )
    facts = {**origin(), "checkpoint": str(loaded.folder), "step": loaded.step, "data": str(dataset.folder)}
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(long_table(reading, names, shared, texts, memory.orders), out / "gates.parquet")
        figure = gates_figure(summaries, columns, out)
        rows = collision_rows(shared, reading.layers, memory.orders, memory.num_heads)
        build_page(subtitle, reading, summaries, figure, columns, rows, texts, show).write(out / "gates.html")
        write_provenance(out, facts)
    for one in summaries:
        score = f"AUC {one.auc.value:.3f} ({one.auc.low:.3f} to {one.auc.high:.3f}), {one.auc.verdict}"
        yield f"layer {one.layer}, stream {one.stream}: {score}"
    yield from (str(out / name) for name in ("gates.html", "gates.parquet", "gates_by_stream.csv"))
