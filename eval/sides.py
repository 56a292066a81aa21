"""Two recipes of training side by side, each as checkpoints that differ in their seeds, and the texts that all read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram.config import Config, UserError
from engram.data.tokenizer import Tokenizer
from engram.training.checkpoint import Checkpoint, open_checkpoint
from engram.training.provenance import origin
from eval.documents import read_documents
from eval.loading import open_split


@dataclass(frozen=True)
class Run:
    """One checkpoint of a side."""

    side: str
    folder: Path
    config: Config
    step: int

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def num_layers(self) -> int:
        return self.config.model.num_layers

    def facts(self) -> dict[str, Any]:
        """For the provenance of a result."""
        return {"model": self.side, "checkpoint": str(self.folder), "step": self.step, "seed": self.seed}


@dataclass(frozen=True)
class Texts:
    """Documents of a prepared split, each cut to `length` tokens."""

    documents: list[list[int]]
    folder: str
    length: int

    @property
    def targets(self) -> int:
        """Tokens that have one before them: what is measured."""
        return sum(len(document) - 1 for document in self.documents)

    def __str__(self) -> str:
        return f"{len(self.documents):,} validation documents of {self.folder}, {self.targets:,} tokens"


def open_runs(sides: dict[str, Sequence[str]]) -> tuple[list[Run], Tokenizer]:
    """The checkpoints of each side by its name, in order, and their common tokenizer.

    Raises UserError: no checkpoint; one given twice; tokenizers differ; runs of one side differ in what is comparable
    between seeds (blocks, memory's layers, streams).
    """
    runs: list[Run] = []
    tokenizer, digest = None, ""
    for side, paths in sides.items():
        for path in paths:
            checkpoint = open_checkpoint(path)
            run = Run(side, checkpoint.folder, checkpoint.config, int(checkpoint.state["step"]))
            if tokenizer is None:
                tokenizer = checkpoint.tokenizer()
                digest = tokenizer.digest
            _check(run, checkpoint, runs, digest)
            runs.append(run)
    assert tokenizer is not None
    return runs, tokenizer


def read_texts(runs: Sequence[Run], tokenizer: Tokenizer, data: str | None, tokens: int) -> Texts:
    """The first validation documents, cut to the shortest sequence length in training; data None: of the first run.

    Raises UserError: not prepared, or made with another tokenizer.
    """
    dataset = open_split(data or runs[0].config.data.path, tokenizer)
    length = min(run.config.data.sequence_length for run in runs)
    return Texts(read_documents(dataset, length, tokens), str(dataset.folder), length)


def measured_on(runs: Sequence[Run], texts: Texts, settings: Any) -> dict[str, Any]:
    """For `provenance.json`: which code measured which runs on which texts; `settings` is a dataclass."""
    return {
        **origin(),
        "settings": asdict(settings),
        "texts": str(texts),
        "document_length": texts.length,
        "runs": [run.facts() for run in runs],
    }


def of_side(runs: Sequence[Run], side: str) -> list[int]:
    """Indices of a side's runs."""
    return [index for index, run in enumerate(runs) if run.side == side]


def _check(run: Run, checkpoint: Checkpoint, others: Sequence[Run], digest: str) -> None:
    found = checkpoint.tokenizer().digest
    if found != digest:
        raise UserError(
            f"{run.folder} was trained with tokenizer {found[:12]}..., but {others[0].folder} with {digest[:12]}...: "
            "their predictions are of different tokens. Compare models of one tokenizer"
        )
    siblings = [other for other in others if other.side == run.side]
    if any(other.folder.resolve() == run.folder.resolve() for other in siblings):
        raise UserError(f"{run.folder} is given twice for {run.side}: give runs that differ in their seeds")
    if siblings and _geometry(siblings[0]) != _geometry(run):
        raise UserError(
            f"{run.folder} and {siblings[0].folder} differ in blocks, memory layers or streams, but both are given for "
            f"{run.side}: give runs of one recipe that differ in their seeds, and another recipe with --baseline"
        )


def _geometry(run: Run) -> tuple[object, ...]:
    model = run.config.model
    return model.num_layers, model.memory and model.memory.layer_ids, model.hc_mult
