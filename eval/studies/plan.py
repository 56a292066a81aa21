"""Which studies two recipes allow, each with all that its numbers depend on; and why the others do not apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engram.data.manifest import NAME as MANIFEST
from engram.training.files import sha256
from eval.cka import study as cka
from eval.depth import study as depth
from eval.facts import study as facts
from eval.gates import study as gates
from eval.lens import study as lens
from eval.lens.tables import Settings as LensSettings
from eval.loading import load, open_split
from eval.score_cache import checkpoint_digest
from eval.sensitivity import study as sensitivity
from eval.sided_table import side_names
from eval.sides import Run, open_runs, read_texts
from eval.studies import perplexity
from eval.studies.kept import Study

# Counts changes of what a study measures or shows: those that are kept from before it are made again.
VERSION = 1
_HEAT_MAPS = 3


@dataclass(frozen=True)
class Wanted:
    """Options of all studies; `data` None: what the first checkpoint was trained on; `tokens`: that each reads."""

    data: str | None
    tokens: int
    level: float
    seed: int
    device: str
    threads: int | None


@dataclass(frozen=True)
class Plan:
    """`left_out`: a sentence for each study that these models do not allow."""

    runs: list[Run]
    studies: list[Study]
    left_out: list[str]


def plan(sides: dict[str, Sequence[str]], wanted: Wanted) -> Plan:
    """Open all checkpoints and the texts, and measure nothing.

    Raises UserError: no checkpoint or damaged, other tokenizers, data that is not prepared or has too little text.
    """
    runs, tokenizer = open_runs(sides)
    # A run that goes on meanwhile has one latest checkpoint for all studies.
    fixed: dict[str, Sequence[str]] = {
        side: [str(run.folder) for run in runs if run.side == side] for side in side_names(runs)
    }
    wanted = replace(wanted, data=wanted.data or str(runs[0].config.data.path))
    # Raises here, and not in each study, where the data or the number of tokens is no good.
    texts = read_texts(runs, tokenizer, wanted.data, wanted.tokens)
    builder = _Builder(runs, fixed, wanted, sha256(Path(texts.folder) / MANIFEST))
    return Plan(runs, list(builder.studies()), list(builder.left_out()))


@dataclass(frozen=True)
class _Builder:
    runs: list[Run]
    sides: dict[str, Sequence[str]]
    wanted: Wanted
    # Of the manifest, which holds the digests of all files of the data.
    data_digest: str

    def studies(self) -> Iterator[Study]:
        """In the order of the page."""
        wanted, sides = self.wanted, self.sides
        shared: dict[str, Any] = dict(data=wanted.data, tokens=wanted.tokens, level=wanted.level, seed=wanted.seed)
        common = wanted.device, wanted.threads
        loss, curve, similar = perplexity.Settings(**shared), LensSettings(**shared), cka.Settings(**shared)
        yield self._study("perplexity", "Perplexity", lambda out, c: perplexity.study(sides, loss, out, *common, c))
        yield self._study("logit_lens", "LogitLens", lambda out, c: lens.study(sides, curve, out, *common, c))
        if len(sides) > 1:
            yield self._study("cka", "Similarity of layers", lambda out, c: cka.study(sides, similar, out, *common, c))
        yield self._study("depth", "Effective depth", lambda out, c: depth.study(sides, curve, out, *common, c))
        gated = self._with_memory(gate=True)
        for side in gated:
            yield self._gates(side, len(gated) > 1)
        changed = self._with_memory()
        for side in changed:
            yield self._sensitivity(side, len(changed) > 1)
        if self._has_world():
            yield self._facts()

    def left_out(self) -> Iterator[str]:
        if len(self.sides) < 2:
            yield "Similarity of layers compares two models: name another one with --baseline."
        if not self._with_memory(gate=True):
            yield "Memory gates: no model here has a memory with gates."
        if not self._with_memory():
            yield "Sensitivity: no model here has a memory that could be changed."
        if not self._has_world():
            yield "Facts are asked of models that were all trained on a world of invented facts; these were not."

    def _gates(self, side: str, several: bool) -> Study:
        # One run shows what gates do; which stream does what differs between seeds.
        run, wanted = next(run for run in self.runs if run.side == side), self.wanted
        length = run.config.data.sequence_length
        documents = max(1, wanted.tokens // length)

        def make(out: Path, console: Console) -> list[str]:
            loaded = load(run.folder, wanted.device, "float32", wanted.threads)
            dataset = open_split(str(wanted.data), loaded.tokenizer)
            return list(gates.study(loaded, dataset, out, documents, length, _HEAT_MAPS))

        return self._study(*self._named("gates", "Memory gates", side, several), make, page="gates.html", sides=[side])

    def _sensitivity(self, side: str, several: bool) -> Study:
        wanted = self.wanted
        settings = sensitivity.Settings(
            tasks=("loss", "facts") if self._has_world() else ("loss",),
            modes=("zero_embedding", "mean", "shuffled"),
            per=None,
            data=wanted.data,
            tokens=wanted.tokens,
            reference_tokens=wanted.tokens,
            level=wanted.level,
            seed=wanted.seed,
        )

        def make(out: Path, console: Console) -> list[str]:
            return sensitivity.study(self.sides[side], settings, out, wanted.device, wanted.threads, console)

        names = self._named("sensitivity", "Sensitivity to memory", side, several)
        return self._study(*names, make, page="sensitivity.html", sides=[side])

    def _facts(self) -> Study:
        wanted, (checkpoints, *others) = self.wanted, self.sides.values()
        baseline = others[0] if others else []
        settings = facts.Settings(level=wanted.level, seed=wanted.seed)

        def make(out: Path, console: Console) -> list[str]:
            return facts.study(checkpoints, baseline, settings, out, wanted.device, wanted.threads, console)

        return self._study("facts", "Facts of an invented world", make)

    def _study(
        self,
        name: str,
        title: str,
        make: Callable[[Path, Console], list[str]],
        *,
        page: str = "",
        sides: Sequence[str] = (),
    ) -> Study:
        names = sides or list(self.sides)
        digests = {side: [checkpoint_digest(Path(path)) for path in self.sides[side]] for side in names}
        # Threads and device change the last digits alone.
        options = {key: value for key, value in asdict(self.wanted).items() if key not in ("device", "threads")}
        identity = {
            "version": VERSION,
            "study": name,
            "checkpoints": digests,
            "folders": {side: list(self.sides[side]) for side in names},
            "options": options,
            "data_sha256": self.data_digest,
        }
        return Study(name, title, page or f"{name}.html", identity, make)

    def _named(self, name: str, title: str, side: str, several: bool) -> tuple[str, str]:
        """Folder and title of a study of one side."""
        first = side == next(iter(self.sides))
        return name if first else f"{name}_baseline", f"{title}: {side}" if several else title

    def _with_memory(self, gate: bool = False) -> list[str]:
        """Sides whose runs have a memory, or one with gates."""
        found = [
            run.side
            for run in self.runs
            if run.config.model.memory is not None and (not gate or run.config.model.memory.gate is not None)
        ]
        return list(dict.fromkeys(found))

    def _has_world(self) -> bool:
        return all(sum(source.world is not None for source in run.config.data.sources) == 1 for run in self.runs)
