"""CKA and alignment of two recipes: measure all runs at the same positions, and write tables, figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from engram.config import UserError
from engram.data.tokenizer import Tokenizer
from engram.report.figure import to_csv
from engram.training.files import write_atomically
from engram.training.provenance import origin
from eval.cka.alignment import Alignment, aligners, alignment, check_equal_layers
from eval.cka.page import build_page, lines
from eval.cka.positions import Positions, all_positions
from eval.cka.similarity import Pair, Reading, compare
from eval.cka.tables import Found
from eval.documents import read_documents
from eval.entities import Entities, entity_positions, passages_of, read_few_nerd
from eval.loading import load, open_split
from eval.output import write_provenance, writing_into
from eval.over_runs import Sample
from eval.points import Point
from eval.progress import progress
from eval.sides import Run, of_side, open_runs

DRAWS = 2000
# Positions of a batch, one of which is left out for each interval.
LEAST = 5


@dataclass(frozen=True)
class Settings:
    """What is compared, and how; `data` None: what the first model was trained on."""

    positions: str = "entities"
    entities: Path | None = None
    max_entities: int | None = None
    distinct_last_token: bool = False
    point: Point = "resid_post"
    stream: int | None = None
    unit_norm: bool = False
    batch: int = 256
    top_k: int = 5
    null: str = "baseline"
    exact: bool = False
    data: str | None = None
    tokens: int = 100_000
    level: float = 0.9
    seed: int = 0


def study(
    sides: dict[str, Sequence[str]], settings: Settings, out: Path, device: str, threads: int | None, console: Console
) -> list[str]:
    """Compare the k-th checkpoint with the k-th baseline, and write all into `out`; -> lines for the terminal.

    `cka.{png,pdf,svg,csv}`, `alignment.{png,pdf,svg,csv}`, `cka.html`, `provenance.json` and, for entities,
    `entities.csv`. All models are in memory at once. Raises UserError.
    """
    runs, tokenizer = open_runs(sides)
    names = list(sides)
    model, baseline = (of_side(runs, side) for side in names)
    if settings.batch < LEAST:
        raise UserError(f"--batch {settings.batch}: CKA of a batch needs 4 positions, its interval {LEAST}: raise it")
    if len(baseline) < len(model):
        raise UserError(
            f"{len(model)} checkpoints, but {len(baseline)} baselines: give each checkpoint a baseline of its own; "
            "more baselines serve the null between seeds"
        )
    if settings.null != "none":
        check_equal_layers([run.num_layers for run in runs])
    positions, entities, described = _positions(runs, tokenizer, settings)
    pairs = _pairs(model, baseline, settings.null)
    used = sorted({one for found in pairs.values() for pair in found for one in pair})
    reading = Reading(
        settings.point, settings.stream, settings.unit_norm, settings.batch, settings.exact, settings.seed
    )
    loaded = {one: load(runs[one].folder, device, "float32", threads).model for one in used}
    with progress(console) as bar:
        found = compare(
            [loaded[one] for one in used],
            [(used.index(a), used.index(b)) for some in pairs.values() for a, b in some],
            positions,
            reading,
            bar(f"{len(used)} models", len(positions.row_N)),
        )

    def samples(kind: str) -> list[Sample]:
        return [found.sample((used.index(a), used.index(b)), DRAWS, settings.seed) for a, b in pairs[kind]]

    matrices = {kind: samples(kind) for kind in pairs}
    result = Found(
        sides=(names[0], names[1]),
        matrices=matrices,
        exact={
            kind: np.mean([found.exact[used.index(a), used.index(b)] for a, b in some], axis=0)
            for kind, some in pairs.items()
            if settings.exact
        },
        alignments=_alignments(matrices, settings.top_k),
        undefined=sum(int(np.isnan(sample.value).sum()) for some in matrices.values() for sample in some),
        largest_share=found.largest_share(),
        level=settings.level,
        top_k=settings.top_k,
        described=described,
    )
    facts: dict[str, Any] = {
        **origin(),
        "settings": {**asdict(settings), "entities": settings.entities and str(settings.entities)},
        "draws": DRAWS,
        "positions": len(positions.row_N),
        "units": positions.units,
        "texts": described,
        "entities": None if entities is None else entities.counts,
        "undefined": result.undefined,
        "largest_share": result.largest_share,
        "runs": [run.facts() for run in runs],
    }
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        if entities is not None:
            write_atomically(out / "entities.csv", to_csv(_entity_columns(entities, tokenizer)))
        write_provenance(out, facts)
        build_page(result, out).write(out / "cka.html")
    return [*lines(result), str(out / "cka.html")]


def _positions(runs: Sequence[Run], tokenizer: Tokenizer, settings: Settings) -> tuple[Positions, Entities | None, str]:
    length = min(run.config.data.sequence_length for run in runs)
    if settings.entities is not None:
        passages, where = iter(read_few_nerd(settings.entities)), str(settings.entities)
    else:
        dataset = open_split(settings.data or runs[0].config.data.path, tokenizer)
        documents = read_documents(dataset, length, settings.tokens)
        where = f"{len(documents):,} validation documents of {dataset.folder}"
        if settings.positions == "all":
            positions = all_positions(documents)
            return positions, None, f"all {len(positions.row_N):,} tokens of {where}"
        passages = passages_of(documents, tokenizer)
    entities = entity_positions(
        passages, tokenizer, length, settings.max_entities, distinct_last_token=settings.distinct_last_token
    )
    described = (
        f"{len(entities.chosen):,} entities (n = {entities.mentions:,} mentions, n_unique = {entities.unique:,}, "
        f"{entities.counts['distinct_last_tokens']:,} last tokens) of {where}"
    )
    return entities.positions, entities, described


def _pairs(model: Sequence[int], baseline: Sequence[int], null: str) -> dict[str, list[Pair]]:
    """Rows and columns of the matrices, the same number of each kind: the model's, and those of the nulls."""
    own = list(zip(baseline, model, strict=False))
    found = {"model": own}
    if null != "none":
        found["self"] = [(row, row) for row, _ in own]
        if len(baseline) > 1:
            found["seeds"] = [(baseline[(index + 1) % len(baseline)], row) for index, (row, _) in enumerate(own)]
    return found


def _alignments(matrices: dict[str, list[Sample]], top_k: int) -> dict[str, dict[str, list[Alignment]]]:
    """By way of alignment and kind of null; without a null, against a model that is like nothing, which is NaN."""
    nulls = {kind: found for kind, found in matrices.items() if kind != "model"}
    own = matrices["model"]
    if not nulls:
        nulls = {"none": [Sample(np.full_like(one.value, np.nan), np.full_like(one.draws, np.nan)) for one in own]}
    return {
        how: {
            kind: [alignment(one, null, how, top_k) for one, null in zip(own, found, strict=True)]
            for kind, found in nulls.items()
        }
        for how in aligners()
    }


def _entity_columns(entities: Entities, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    raw = tokenizer.raw_tokens()
    return {
        "entity": [mention.entity for mention in entities.chosen],
        "text": [mention.row for mention in entities.chosen],
        "position": [mention.position for mention in entities.chosen],
        "token_id": [mention.token for mention in entities.chosen],
        "token": [raw[mention.token] for mention in entities.chosen],
    }
