"""A suite's tasks as sensitivity asks them: each task's main score, what guessing scores, and what the task is about.

The Engram paper's Figure 6 keeps 44 to 95 % of knowledge and reading benchmarks with the memory switched off.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.config import UserError
from eval.benchmarks.catalogue import benchmarks
from eval.loading import Loaded
from eval.results import Item, is_loss
from eval.ruler.measure import STRING_MATCH
from eval.score_cache import ScoreCache
from eval.sensitivity.retained import Kind, Suite
from eval.suites.check import check_suite
from eval.suites.settings import Entry, load_suite
from eval.suites.tasks import Setting, run_entry

# What every task's main metric is called here.
SCORE = "score"
# What a benchmark asks for: facts of the world, or the text in front of it. All others ask for neither alone.
_KNOWLEDGE = ("mmlu", "mmlu_redux", "cmmlu", "ceval", "triviaqa", "popqa", "qa_wikidata", "arc_easy", "arc_challenge")
_LOSSES = ("perplexity", "long_ppl")
_READING = ("c3", "race_middle", "race_high", "drop", "ruler")


def benchmark_suite(path: Path, out: Path, device: str) -> Suite:
    """The tasks of the suite's file but those of losses, which have a table of their own.

    Nothing is cached: answers of a changed model are not its checkpoint's. `chance` and `kinds` fill while the model is
    asked for the first time. Raises UserError: a mistake in the file, data that is missing, no task that has a score.
    """
    suite = load_suite(path)
    asked = [entry for entry in suite.tasks if entry.task not in _LOSSES]
    if not asked or any(entry.task == "facts" for entry in asked):
        what = "facts are asked by --tasks facts" if asked else "it measures losses alone, which --tasks loss does"
        raise UserError(f"{path}: {what}: give a suite of other tasks")
    check_suite(suite, run_code=False)
    chance: dict[str, float] = {}
    kinds: dict[str, Kind] = {}

    def items(loaded: Loaded) -> list[Item]:
        setting = Setting(suite, out, out, ScoreCache(None, loaded), device)
        found = []
        for entry in asked:
            result = run_entry(loaded, entry, setting)
            for item in _main_items(entry, result.items):
                found.append(item)
                chance.setdefault(item.task, _chance(result.found))
                kinds.setdefault(item.task, _kind(entry.task))
        return found

    return Suite("suite", items, SCORE, chance, kinds)


def _main_items(entry: Entry, items: Sequence[Item]) -> list[Item]:
    """Those of the paper's metric, or of the task's first one that rises. Raises UserError where there is none."""
    known = benchmarks().get(entry.task)
    wanted = STRING_MATCH if entry.task == "ruler" else known.metric if known and entry.yaml is None else None
    names = [item.metric for item in items if not is_loss(item.metric) and item.metric != "margin"]
    chosen = next((name for name in names if wanted in (None, name.partition(",")[0])), next(iter(names), None))
    if chosen is None:
        raise UserError(f"task {entry.title} has no score that rises with what a model knows: leave it out")
    return [Item(item.task, item.id, SCORE, item.value) for item in items if item.metric == chosen]


def _chance(found: Mapping[str, Any] | None) -> float:
    """The mean of 1 / choices where all questions are multiple choice; else 0: no text is right by chance."""
    samples = [sample for own in found["samples"].values() for sample in own] if found else []
    if not samples or not all(_is_choice(sample) for sample in samples):
        return 0.0
    return sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples)


def _is_choice(sample: Mapping[str, Any]) -> bool:
    target, answers = sample.get("target"), sample.get("filtered_resps")
    return isinstance(target, int) and not isinstance(target, bool) and isinstance(answers, list) and len(answers) > 1


def _kind(task: str) -> Kind:
    return "knowledge" if task in _KNOWLEDGE else "reading" if task in _READING else "other"
