"""What a report tells about one run: read from its folder, and measured on its latest checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.config import Config, UserError, load_config
from engram.inference.generate import generate
from engram.training.checkpoint_files import latest_checkpoint
from engram.training.metrics import read_metrics
from eval import ngram, perplexity
from eval.gates import text as gates
from eval.loading import Loaded, load, open_split


@dataclass(frozen=True)
class Run:
    """`done` is None for a run with steps to go; whatever could not be measured is None, and `notes` say why."""

    folder: Path
    name: str
    config: Config
    metrics: list[dict[str, Any]]
    done: dict[str, Any] | None
    code: dict[str, Any]
    step: int | None
    result: perplexity.Perplexity | None
    baselines: ngram.Baselines | None
    sample: str | None
    gates: gates.Gates | None
    notes: list[str]


def read_run(folder: str | Path, name: str, data: str | None = None, device: str = "auto") -> Run:
    """Read a run folder and evaluate its latest checkpoint as its config's `eval` section says.

    `data` replaces the config's data folder. Raises UserError: not a run folder, no metrics, a damaged checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: is not a run folder (config.yaml is missing): give the run_dir of a training run")
    config = load_config(folder / "config.yaml")
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder}: has no metrics yet: train it first with python train.py")
    notes: list[str] = []
    loaded = load(folder, device) if latest_checkpoint(folder) else None
    if loaded is None:
        notes.append("There is no checkpoint yet: nothing was measured.")
    result, baselines = _losses(loaded, config, data or config.data.path, notes) if loaded else (None, None)
    code = _json(folder / "code.json")
    return Run(
        folder=folder,
        name=name,
        config=config,
        metrics=metrics,
        done=_json(folder / "done.json") or None,
        code=(code.get("starts") or [code])[0],
        step=loaded.step if loaded else None,
        result=result,
        baselines=baselines,
        sample=_attempt(notes, lambda: sample(loaded, config)) if loaded else None,
        gates=_attempt(notes, lambda: read_gates(loaded, config.eval.gate_text)) if loaded else None,
        notes=notes,
    )


def sample(loaded: Loaded, config: Config) -> str:
    """The continuation of the config's prompt."""
    ids = loaded.encode(config.eval.prompt)
    out = generate(
        loaded.model,
        [ids],
        config.eval.sample_tokens,
        temperature=config.eval.temperature,
        seed=config.seed,
        eos_id=loaded.tokenizer.eos_id,
    )[0].tolist()
    return loaded.continuation(ids, out)


def read_gates(loaded: Loaded, text: str) -> gates.Gates | None:
    """Gates of a text, or None for a model that has none."""
    memory = loaded.config.model.memory
    if memory is None or memory.gate is None:
        return None
    ids = loaded.encode(text)
    return gates.measure(loaded.model, ids, gates.token_texts(loaded.tokenizer, ids))


def _losses(
    loaded: Loaded, config: Config, data: str, notes: list[str]
) -> tuple[perplexity.Perplexity | None, ngram.Baselines | None]:
    if not Path(data).exists():
        notes.append(f"The prepared data is not at {data}: losses were not measured (--data names another folder).")
        return None, None
    dataset = open_split(data, loaded.tokenizer)
    length, tokens = config.data.sequence_length, config.eval.tokens
    result = perplexity.measure_split(loaded.model, loaded.tokenizer, dataset, length, config.eval.batch_size, tokens)
    return result, ngram.measure(data, length, tokens)


def _attempt(notes: list[str], task: Callable[[], Any]) -> Any:
    """A part of the report that a user's setting makes impossible costs a note, not the report."""
    try:
        return task()
    except UserError as error:
        notes.append(str(error))
        return None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
