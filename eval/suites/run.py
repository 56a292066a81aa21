"""A suite on a checkpoint, on its last N, and beside a baseline: runs every task and writes the results folder.

OUT/  metrics.csv items.csv metrics.parquet provenance.json  results_<time>.json samples_<task>_<time>.jsonl
      tasks/ (what lm-eval ran)  cache.sqlite  long_ppl/ (evaluators' losses)  baseline/...  steps/step_000100/...
      comparison.* series.*  index.html
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from engram.config import UserError
from engram.model.accounting import rho
from engram.training.checkpoint_files import CHECKSUMS, latest_checkpoint, step_folders
from engram.training.files import sha256
from engram.training.metrics import read_metrics
from engram.training.provenance import origin
from eval import ranks
from eval.bootstrap import interval
from eval.loading import Loaded, load
from eval.output import writing_into
from eval.results import Item, Metric, by_unit, write_results, write_tidy
from eval.score_cache import ScoreCache, identity
from eval.suites.lm_run import write_lm_eval_files
from eval.suites.settings import Suite
from eval.suites.tasks import Setting, TaskResult, run_entry


@dataclass(frozen=True)
class Options:
    """What the command line adds to a suite."""

    out: Path
    last: int = 1
    cache: Path | None = None
    device: str = "auto"
    threads: int | None = None
    # How the model's checkpoint was chosen to fit the baseline's.
    matched: str | None = None
    # Prepared data that all models read, where the suite names none.
    texts: str | None = None


@dataclass(frozen=True)
class Outcome:
    """All tasks' results of one checkpoint; `intervals`: low and high by task, metric and group."""

    label: str
    folder: Path
    step: int
    metrics: list[Metric]
    items: list[Item]
    intervals: dict[tuple[str, str, str], tuple[float, float]]
    # Why tasks could not be run, by their names.
    failed: dict[str, str]
    # What a reader of the numbers must know, each with its task's name.
    warnings: tuple[str, ...] = ()


def checkpoints(path: str | Path, last: int) -> list[Path]:
    """The last `last` checkpoints of a run folder, oldest first; 1: its latest, or a checkpoint itself.

    Raises UserError: fewer than that, or a checkpoint where a run folder is needed.
    """
    folder = Path(path)
    if last == 1:
        return [folder if (folder / CHECKSUMS).exists() else latest_checkpoint(folder) or folder]
    found = step_folders(folder) if folder.is_dir() else []
    if len(found) < last:
        raise UserError(
            f"{folder}: has {len(found)} checkpoints, but --last asks for {last}: give a run folder that keeps more "
            "(train.keep_checkpoints), or lower --last"
        )
    return found[-last:]


def run_suite(
    suite: Suite, path: str | Path, label: str, options: Options, console: Console, baseline: bool = False
) -> list[Outcome]:
    """The suite on each of the last checkpoints of `path`, with a results folder for each; the last one's is the main.

    Under torchrun every process computes and the first one writes. Raises UserError.
    """
    folders = checkpoints(path, options.last)
    out = options.out / "baseline" if baseline else options.out
    outcomes = []
    for place, folder in enumerate(folders):
        own = out if place == len(folders) - 1 else out / "steps" / folder.name
        outcomes.append(_run_checkpoint(suite, folder, label, own, options, console))
    return outcomes


def _run_checkpoint(suite: Suite, folder: Path, label: str, out: Path, options: Options, console: Console) -> Outcome:
    loaded = load(folder, options.device, suite.dtype, options.threads)
    with ExitStack() as undo:
        first, had_tasks = ranks.world()[0] == 0, (out / "tasks").exists()
        if not first:
            out = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error}): name another folder with --out") from None
        cache = ScoreCache((options.cache or options.out / "cache.sqlite") if first else None, loaded)
        undo.callback(cache.close)
        setting = Setting(suite, out, options.out if first else out, cache, options.device, texts=options.texts)
        time = datetime.now(UTC).replace(tzinfo=None)
        outcome = _outcome(label, loaded, {}, {}, suite)
        with writing_into(out):
            for results, failed in _run_tasks(suite, loaded, setting, console):
                # After each task: whatever happens to those that follow, it stays.
                outcome = _outcome(label, loaded, results, failed, suite)
                if results:
                    _write(suite, loaded, outcome, results, out, options.matched, time)
        if not outcome.metrics:
            undo.close()
            _clear(out, cache, tasks=not had_tasks)
            raise UserError("\n".join(outcome.failed.values()))
    return outcome


def _clear(out: Path, cache: ScoreCache, tasks: bool) -> None:
    """A folder in which nothing was measured keeps no preparations. `tasks`: whether lm-eval's files are new."""
    if tasks:
        shutil.rmtree(out / "tasks", ignore_errors=True)
    cache.remove_if_empty()
    with suppress(OSError):
        out.rmdir()


def _outcome(
    label: str, loaded: Loaded, results: Mapping[str, TaskResult], failed: dict[str, str], suite: Suite
) -> Outcome:
    items = [item for result in results.values() for item in result.items]
    metrics = [metric for result in results.values() for metric in result.metrics]
    intervals = _intervals(items, suite)
    warnings = tuple(f"{name}: {text}" for name, result in results.items() for text in result.warnings)
    return Outcome(label, loaded.folder, loaded.step, metrics, items, intervals, dict(failed), warnings)


def _run_tasks(
    suite: Suite, loaded: Loaded, setting: Setting, console: Console
) -> Iterator[tuple[dict[str, TaskResult], dict[str, str]]]:
    """Results so far, and why tasks failed, after each task."""
    results: dict[str, TaskResult] = {}
    failed: dict[str, str] = {}
    shown = (TextColumn("{task.description:<40}"), TextColumn("{task.completed:>9,} requests"), TimeElapsedColumn())
    hidden = not console.is_terminal or ranks.world()[0] != 0
    with Progress(*shown, console=console, transient=True, disable=hidden) as bars:
        for entry in suite.tasks:
            bar = bars.add_task(f"{loaded.folder.name}: {entry.title}", total=None)
            try:
                results[entry.title] = run_entry(loaded, entry, replace(setting, advance=_advance(bars, bar)))
            except UserError as error:
                failed[entry.title] = str(error)
            yield results, failed


def _advance(bars: Progress, bar: Any) -> Callable[[int], None]:
    return lambda amount: bars.advance(bar, amount)


def _intervals(items: Sequence[Item], suite: Suite) -> dict[tuple[str, str, str], tuple[float, float]]:
    """The bootstrap's interval of each mean, over items; group "" is over all groups."""
    grouped: dict[tuple[str, str, str], list[Item]] = {}
    for item in items:
        for group in dict.fromkeys((item.group, "")):
            grouped.setdefault((item.task, item.metric, group), []).append(item)
    found = {key: interval(*by_unit(own), level=suite.level, seed=suite.seed) for key, own in grouped.items()}
    return {key: (float(one.low), float(one.high)) for key, one in found.items()}


def _write(
    suite: Suite,
    loaded: Loaded,
    outcome: Outcome,
    results: dict[str, TaskResult],
    out: Path,
    matched: str | None,
    time: datetime,
) -> None:
    facts: dict[str, Any] = {
        **origin(),
        **identity(loaded),
        "checkpoint_folder": str(loaded.folder),
        "step": loaded.step,
        "tokens": loaded.step * loaded.config.tokens_per_step,
        "val_loss": _val_loss(loaded),
        "config": sha256(loaded.folder / "config.yaml"),
        "seed": loaded.config.seed,
        "rho": rho(loaded.config.model),
        "matched": matched,
        "suite": suite.model_dump(mode="json"),
        "tasks": {name: result.facts for name, result in results.items()},
        "failed": outcome.failed,
        "warnings": outcome.warnings,
        "created_at": time.isoformat(),
    }
    write_results(out, outcome.metrics, outcome.items, facts)
    write_tidy(out / "metrics.parquet", [_tidy(metric, outcome, facts) for metric in outcome.metrics])
    if found := [result.found for result in results.values() if result.found is not None]:
        write_lm_eval_files(out, found, {"engram": facts}, time)


def _val_loss(loaded: Loaded) -> float | None:
    """What the run logged at this checkpoint's step, in nats per token."""
    lines = read_metrics(loaded.folder.parent / "metrics.jsonl")
    return next((line.get("val_loss") for line in lines if line["step"] == loaded.step), None)


def _tidy(metric: Metric, outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    low, high = outcome.intervals.get((metric.task, metric.metric, metric.group), (math.nan, math.nan))
    # Tasks of several lengths add one to their name.
    own = facts["tasks"].get(metric.task.partition("@")[0].partition("/")[0], {})
    return asdict(metric) | {
        "low": low,
        "high": high,
        "level": facts["suite"]["level"],
        "label": outcome.label,
        "checkpoint": str(outcome.folder),
        "checkpoint_sha256": facts["checkpoint"],
        "tokenizer_sha256": facts["tokenizer"],
        "config_sha256": facts["config"],
        "step": outcome.step,
        "tokens": facts["tokens"],
        "val_loss": facts["val_loss"],
        "seed": facts["seed"],
        "rho": facts["rho"],
        "matched": facts["matched"],
        "dtype": facts["dtype"],
        "data_sha256": own.get("data_sha256"),
        "lm_eval_version": own.get("lm_eval_version"),
        "commit": facts["commit"],
        "created_at": facts["created_at"],
    }
