"""Ask several checkpoints about their world, and write tables, figures and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from engram.config import Config, UserError
from engram.data.world import World
from engram.model.accounting import rho
from engram.report.figure import to_csv
from engram.training.checkpoint import open_checkpoint
from engram.training.files import write_atomically
from engram.training.provenance import origin
from eval.facts.crowding import crowded_items
from eval.facts.page import build_page, shown
from eval.facts.questions import SETS, ask
from eval.facts.score import facts_items, world_of
from eval.facts.tables import Run, collision_rows, columns_of, difference_rows, exposure_rows, score_rows
from eval.loading import Loaded, load
from eval.output import writing_into
from eval.results import Metric, summarise, write_results

# Settings of a run that its seeds may change, and those that change no answer.
_SEEDS = {"seed": 0, "run_dir": "runs/run"}


@dataclass(frozen=True)
class Settings:
    """The sets to ask, the level of the intervals and the seed of their draws."""

    sets: tuple[str, ...] = SETS
    level: float = 0.95
    seed: int = 0


def study(
    checkpoints: Sequence[str],
    baseline: Sequence[str],
    settings: Settings,
    out: Path,
    device: str,
    threads: int | None,
    console: Console,
) -> list[str]:
    """Score all checkpoints and write `out`; -> lines for the terminal. One model is in memory at a time.

    Runs that differ in their seeds alone are one recipe; those of `baseline` must be. Raises UserError: not trained on
    a world, or on different worlds; a baseline of several recipes.
    """
    paths = [*baseline, *checkpoints]
    world, labels = _one_world(paths, len(baseline))
    runs: list[Run] = []
    with _progress(console) as begin:
        for path, label in zip(paths, labels, strict=True):
            loaded = load(path, device, "float32", threads)
            runs.append(_asked(loaded, world, label, settings, begin))
    base, others = runs[: len(baseline)], runs[len(baseline) :]
    with writing_into(out):
        return _write(world, base, others, settings, out)


def _one_world(paths: Sequence[str], baseline: int) -> tuple[World, list[str]]:
    """The world of all checkpoints, and what their recipes are called; before anything is measured."""
    configs = [open_checkpoint(path).config for path in paths]
    worlds = [world_of(config) for config in configs]
    for path, world in zip(paths, worlds, strict=True):
        if world != worlds[0]:
            raise UserError(
                f"{path} was trained on another world than {paths[0]}: give models whose data.sources hold equal "
                "settings of the world"
            )
    labels = _labels(configs)
    if len(set(labels[:baseline])) > 1:
        raise UserError(f"--baseline has runs of {', '.join(dict.fromkeys(labels[:baseline]))}: give one recipe")
    return worlds[0], labels


def _asked(
    loaded: Loaded, world: World, recipe: str, settings: Settings, begin: Callable[[str, int], Callable[[int], None]]
) -> Run:
    answers = len(ask(world, settings.sets)) * len(world.towns)
    items = facts_items(loaded, world, settings.sets, advance=begin(loaded.folder.parent.name, answers))
    if loaded.config.model.memory is not None and "local_fact" in settings.sets:
        items = [*items, *crowded_items(loaded, world, items)]
    return Run(recipe, str(loaded.folder), loaded.config.seed, loaded.step, items)


def _write(world: World, base: list[Run], others: list[Run], settings: Settings, out: Path) -> list[str]:
    runs, level, seed = [*base, *others], settings.level, settings.seed
    scores, exposures = score_rows(runs, level, seed), exposure_rows(runs, level, seed)
    differences = difference_rows(others, base, level, seed) if base else []
    collisions = collision_rows(runs, level, seed)
    out.mkdir(parents=True, exist_ok=True)
    steps = ", ".join(f"{step:,}" for step in dict.fromkeys(run.step for run in runs))
    recipes = ", ".join(dict.fromkeys(run.recipe for run in runs))
    subtitle = f"{recipes}; step {steps}; world of seed {world.config.seed}, {len(world.entities):,} entities"
    page = build_page(world, subtitle, scores, exposures, differences, collisions, level, out)
    rows = [*scores, *exposures, *collisions, *differences]
    write_atomically(out / "scores.csv", to_csv(columns_of(rows, 1 / len(world.towns))))
    facts: dict[str, Any] = {
        "world": world.config.model_dump(),
        "runs": [{"recipe": run.recipe, "checkpoint": run.folder, "seed": run.seed, "step": run.step} for run in runs],
        "baseline": base[0].recipe if base else None,
        "level": level,
        "seed": seed,
    }
    items = [replace(item, group=_of_run(run, item.group)) for run in runs for item in run.items]
    metrics = [metric for run in runs for metric in _metrics(run)]
    write_results(out, metrics, items, {**origin(), **facts})
    page.write(out / "facts.html")
    lines = [f"{row.recipe}: {row.task} {shown(row)}" for row in scores if row.metric == "accuracy"]
    lines += [
        f"{row.recipe} - {row.baseline}: {row.task} {shown(row)}: {row.verdict}"
        for row in differences
        if row.metric == "accuracy"
    ]
    lines += [f"{row.recipe}: {row.task}, {row.group} {shown(row)}" for row in collisions]
    return [*lines, str(out / "facts.html")]


def _metrics(run: Run) -> Iterator[Metric]:
    """Of each set over all its questions, and of each of its groups."""
    whole = [replace(item, group=_of_run(run, "")) for item in run.items]
    parts = [replace(item, group=_of_run(run, item.group)) for item in run.items if item.group]
    for metric in summarise([*whole, *parts]):
        yield replace(metric, higher_is_better=metric.metric != "bits_per_byte")


def _of_run(run: Run, group: str) -> str:
    name = f"{run.recipe}, seed {run.seed}"
    return f"{name}; {group}" if group else name


def _labels(configs: Sequence[Config]) -> list[str]:
    """Equal names for runs that differ in their seeds alone; recipes of equal shares are numbered."""
    keys = [config.replace(**_SEEDS, data=config.data.replace(shuffle_seed=0)).model_dump_json() for config in configs]
    plain = {key: _label(config) for key, config in zip(keys, configs, strict=True)}
    names: dict[str, str] = {}
    for key, label in plain.items():
        same = [other for other in names if plain[other] == label]
        names[key] = f"{label} ({len(same) + 1})" if same else label
    return [names[key] for key in keys]


def _label(config: Config) -> str:
    if config.model.memory is None:
        return "no memory"
    return f"rho {rho(config.model):.2f}"


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields what starts a bar of a name and a total, and returns its advance; nothing shows off a terminal."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=total)
            return lambda amount: bars.advance(task, amount)

        yield begin
