"""RULER from checkpoints to page: make the samples, ask one or two models, write tables, figures and page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from engram.config import UserError
from engram.training.provenance import origin
from eval.loading import Loaded
from eval.models import load_models
from eval.output import writing_into
from eval.results import Metric, summarise, write_results
from eval.ruler.files import make_samples, settings
from eval.ruler.measure import check_lengths, measure
from eval.ruler.page import Answered, build_page, terminal_lines
from eval.ruler.tasks import ProfileName, all_tasks, choose, read_sources
from eval.score_cache import checkpoint_digest

# Below this, the longer tasks do not fit the words of every tokenizer.
SHORTEST = 256


@dataclass(frozen=True)
class Wanted:
    """What to ask; `lengths` None: the powers of two from SHORTEST to the shorter context."""

    profile: ProfileName
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] | None
    samples: int
    seed: int
    generate: bool
    threshold: float
    level: float
    essay: Path | None = None
    squad: Path | None = None
    hotpot: Path | None = None


def study(
    checkpoints: Mapping[str, str],
    wanted: Wanted,
    out: Path,
    device: str,
    threads: int | None,
    console: Console,
    note: str | None = None,
) -> list[str]:
    """Ask each named checkpoint the same samples and write everything into `out`; -> lines for the terminal.

    Raises UserError before anything is measured: different tokenizers, a length beyond a context, a task that does not
    fit its length, an unknown task, a source file that cannot be read.
    """
    sources = read_sources(wanted.essay, wanted.squad, wanted.hotpot)
    tasks = choose(all_tasks(wanted.profile, sources), wanted.tasks)
    models = load_models(checkpoints, device, "float32", threads)
    tokenizer = next(iter(models.values())).tokenizer
    lengths = wanted.lengths or _powers(models)
    for loaded in models.values():
        check_lengths(lengths, loaded)
    made_of = settings(wanted.profile, tasks, lengths, wanted.samples, wanted.seed, tokenizer.digest, sources)
    rounds = 2 if wanted.generate else 1
    with writing_into(out):
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            total = len(tasks) * len(lengths) * wanted.samples
            making = bar.add_task("making samples", total=total)
            samples = make_samples(out / "samples", tasks, tokenizer, made_of, partial(bar.advance, making))
            bar.update(making, completed=total)
            answered = []
            for name, loaded in models.items():
                asking = bar.add_task(f"asking {name}", total=rounds * total)
                items = measure(loaded, samples, wanted.generate, partial(bar.advance, asking))
                answered.append(Answered(name, str(loaded.folder), loaded.step, items))
        page = build_page(answered, samples, wanted.threshold, wanted.level, wanted.seed, out, note)
        page.write(out / "ruler.html")
        facts = {
            "settings": made_of,
            "matched": note,
            "level": wanted.level,
            "models": {
                one.name: {
                    "checkpoint": one.folder,
                    "step": one.step,
                    "sha256": checkpoint_digest(models[one.name].folder),
                }
                for one in answered
            },
        }
        items = [replace(item, group=f"{one.name}; {item.group}") for one in answered for item in one.items]
        metrics: list[Metric] = summarise(items)
        write_results(out, metrics, items, {**origin(), **facts})
    return [*terminal_lines(answered, samples, wanted.threshold), str(out / "ruler.html")]


def _powers(models: Mapping[str, Loaded]) -> tuple[int, ...]:
    context = min(loaded.config.data.sequence_length for loaded in models.values())
    if context < SHORTEST:
        raise UserError(
            f"the context holds {context} tokens, but RULER needs {SHORTEST}: give --lengths, or a longer one"
        )
    return tuple(2**power for power in range(SHORTEST.bit_length() - 1, context.bit_length()))
