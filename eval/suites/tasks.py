"""What each kind of task in a suite does with a model: items, metrics, and the facts that its numbers depend on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram.config import UserError
from eval import perplexity, ranks
from eval.benchmarks.catalogue import benchmarks
from eval.benchmarks.code import CODE_TASKS
from eval.benchmarks.code import check_rows as check_code_rows
from eval.benchmarks.convert import convert
from eval.benchmarks.manifest import data_digest, whole
from eval.benchmarks.sandbox import check_available, run_program
from eval.documents import document_id, read_documents
from eval.facts.score import facts_items
from eval.loading import Loaded, beyond_training, check_rows, open_split
from eval.long_ppl.cache import OWN_EVALUATOR
from eval.results import Item, Metric, is_loss, summarise
from eval.ruler.files import make_samples, settings
from eval.ruler.measure import check_lengths, measure
from eval.ruler.tasks import all_tasks, read_sources
from eval.score_cache import ScoreCache, checkpoint_digest
from eval.sensitivity.memory_loss import token_losses
from eval.stepwise import Question, answer
from eval.suites.check import data_folder, is_code
from eval.suites.lm_run import answer_items, corpus_metrics, items_of, run_tasks
from eval.suites.lm_tasks import OWN_TASKS, lm_eval_tasks, task_files, write_tasks
from eval.suites.long_ppl import long_ppl_results
from eval.suites.settings import Entry, Suite


@dataclass(frozen=True)
class Setting:
    """What all tasks of one command share. `advance` is told how many requests were answered.

    `out`: of one checkpoint; `shared`: of all that are compared, for what does not depend on the model.
    """

    suite: Suite
    out: Path
    shared: Path
    cache: ScoreCache
    device: str = "auto"
    advance: Callable[[int], None] | None = None
    # Prepared data that all models of the command read; None: what each was trained on.
    texts: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """`found`: what lm-eval itself returned, where it ran; `warnings`: what readers of the numbers must know."""

    items: list[Item]
    metrics: list[Metric]
    facts: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def run_entry(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    """Raises UserError: data that is missing, altered or of another form; a request that does not fit."""
    if entry.task == "perplexity":
        return _perplexity(loaded, entry, setting)
    if entry.task == "facts":
        return _facts(loaded, entry, setting)
    if entry.task == "ruler":
        return _ruler(loaded, entry, setting)
    if entry.task == "long_ppl":
        return _long_ppl(loaded, entry, setting)
    if is_code(entry):
        return _code(loaded, entry, setting)
    return _harness(loaded, entry, setting)


def _perplexity(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    dataset = open_split(entry.data or setting.texts or loaded.config.data.path, loaded.tokenizer)
    items: list[Item] = []
    metrics: list[Metric] = []
    for length in _lengths(entry, loaded):
        check_rows(dataset, length, entry.tokens)
        task = f"{entry.title}@{length}"
        batch_size = max(1, setting.suite.max_tokens // length)
        whole_split = perplexity.measure_split(
            loaded.model, loaded.tokenizer, dataset, length, batch_size, entry.tokens
        )
        for name in ("loss", "perplexity", "bits_per_byte"):
            value = getattr(whole_split, name)
            metrics.append(Metric(task, name, value, float("nan"), whole_split.targets, higher_is_better=False))
        documents = read_documents(dataset, length, entry.tokens)
        own = list(_document_items(loaded, task, documents, setting.suite.max_tokens))
        items += own
        metrics += summarise(own)
    beyond = _beyond(loaded, max(entry.lengths, default=0))
    return TaskResult(items, metrics, {"data": str(dataset.folder)}, warnings=beyond)


def _beyond(loaded: Loaded, length: int) -> tuple[str, ...]:
    warning = beyond_training(loaded, length)
    return () if warning is None else (warning,)


def _facts(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    items = [replace(item, task=f"{entry.title}/{item.task}") for item in facts_items(loaded, advance=setting.advance)]
    return TaskResult(items, summarise(items))


def _ruler(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    """The 13 tasks, on invented texts where the suite names none."""
    sources, lengths = read_sources(entry.essay, entry.squad, entry.hotpot), _lengths(entry, loaded)
    check_lengths(lengths, loaded)
    tasks, digest = all_tasks(entry.profile, sources), loaded.tokenizer.digest
    wanted = settings(entry.profile, tasks, lengths, entry.limit or 50, setting.suite.seed, digest, sources)
    samples = make_samples(setting.out / "ruler", tasks, loaded.tokenizer, wanted)
    found = measure(loaded, samples, generate=True, advance=setting.advance)
    items = [replace(item, task=f"{entry.title}/{item.task}@{item.group}", group="") for item in found]
    return TaskResult(items, summarise(items), {"settings": wanted})


def _long_ppl(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    items: list[Item] = []
    metrics: list[Metric] = []
    facts: dict[str, Any] = {}
    data, cache = entry.data or setting.texts or loaded.config.data.path, setting.shared / "long_ppl"
    for context in _lengths(entry, loaded):
        own, whole_corpus, made = long_ppl_results(
            loaded, entry, context, data, cache, setting.device, setting.suite.max_tokens
        )
        items += own
        metrics += whole_corpus + summarise(own)
        facts[str(context)] = made
    own_evaluator = any(made["evaluator_sha256"] == checkpoint_digest(loaded.folder) for made in facts.values())
    return TaskResult(items, metrics, facts, warnings=(OWN_EVALUATOR.format(loaded.folder),) if own_evaluator else ())


def _lengths(entry: Entry, loaded: Loaded) -> tuple[int, ...]:
    return entry.lengths or (loaded.config.data.sequence_length,)


def _document_items(loaded: Loaded, task: str, documents: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Item]:
    """Mean nats per token of each document, but for its first token: training scores nothing after a document's end."""
    ends = np.cumsum([len(document) - 1 for document in documents])
    losses = np.split(token_losses(loaded.model, documents, max_tokens), ends[:-1])
    for place, (document, own) in enumerate(zip(documents, losses, strict=True)):
        if len(own):
            yield Item(task, document_id(place, document), "document_loss", float(own.mean()), weight=len(own))


def _harness(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    # Light when it is missing: the message comes before anything is imported or computed.
    root = lm_eval_tasks()
    from eval.suites.harness import EngramLM

    known = benchmarks().get(entry.task)
    shots = entry.shots if entry.shots is not None else known.shots if known else 0
    data = data_folder(setting.suite, entry)
    manifest = whole(data)
    folder = setting.out / "tasks"
    tasks = write_tasks(folder, entry.title, _files(entry, root), data, manifest, shots)
    lm = EngramLM(
        loaded,
        setting.cache,
        max_length=entry.max_length,
        allow_truncation=entry.allow_truncation,
        max_tokens=setting.suite.max_tokens,
        advance=setting.advance,
    )
    found = run_tasks(lm, tasks, entry.limit)
    items = items_of(found, tasks, entry.title) + answer_items(found, tasks, entry.title)
    better = {
        name: bool(flag) for one in found["higher_is_better"].values() for name, flag in one.items() if flag is not None
    }
    truncated = {task.subset: len(lm.counts.truncated[task.name]) for task in tasks}
    metrics = [
        replace(metric, num_truncated=truncated.get(metric.group, 0), higher_is_better=_rises(metric.metric, better))
        for metric in summarise(items, num_shots=shots)
    ]
    metrics += corpus_metrics(found, tasks, entry.title)
    if not metrics:
        raise UserError(f"task {entry.title}: lm-eval returned no number for any of its metrics: leave the task out")
    if len(tasks) > 1:
        metrics += [
            replace(metric, num_truncated=sum(truncated.values()), higher_is_better=_rises(metric.metric, better))
            for metric in summarise([replace(item, group="") for item in items], num_shots=shots)
        ]
    facts = {
        "data": str(data),
        "data_sha256": data_digest(manifest),
        "licence": manifest.licence,
        "source": manifest.source,
        "requests": sum(lm.counts.requests.values()),
        "truncated": sum(truncated.values()),
        "merged_boundaries": sum(lm.counts.merged.values()),
        # Nothing was scored there in training.
        "scored_after_end_token": sum(lm.counts.after_end.values()),
        "max_length": lm.max_length,
        "lm_eval_version": found["lm_eval_version"],
    }
    return TaskResult(items, metrics, facts, found, _beyond(loaded, lm.max_length))


def _files(entry: Entry, root: Path) -> list[Path]:
    if entry.yaml is not None:
        own = Path(entry.yaml)
        return [own.resolve()] if own.is_file() else task_files(entry.yaml, root)
    known = benchmarks().get(entry.task)
    if known is None or known.run == "own":
        return task_files((known and known.tasks) or f"{entry.task}.yaml", OWN_TASKS)
    assert known.tasks is not None
    return task_files(known.tasks, root)


def _rises(metric: str, better: dict[str, bool]) -> bool:
    name = metric.partition(",")[0]
    return better.get(name, not is_loss(name))


def _code(loaded: Loaded, entry: Entry, setting: Setting) -> TaskResult:
    """pass@1 of greedy answers. Every process answers and runs its part of the problems."""
    check_available()
    task, data = CODE_TASKS[entry.task], data_folder(setting.suite, entry)
    manifest = whole(data)
    splits = {split: _rows(data, paths) for split, paths in manifest.splits("").items()}
    if "test" not in splits:
        raise UserError(f"{data}: has no split `test`: add the data again")
    for split, own_rows in splits.items():
        check_code_rows(entry.task, own_rows, f"{data}, split {split}")
    shots = benchmarks()[entry.task].shots if entry.shots is None else entry.shots
    examples = splits.get("prompt", splits.get("train", []))[:shots]
    if len(examples) < shots:
        raise UserError(f"{data}: has no split `prompt` with {shots} examples: add it, or set shots: 0")
    rows = splits["test"][: entry.limit]
    max_length = entry.max_length or loaded.config.data.sequence_length
    questions, truncated = [], 0
    for row in rows:
        ids = loaded.encode(task.prompt(row, examples))
        room = max_length - task.max_new_tokens
        new = task.max_new_tokens
        if len(ids) > room:
            if not entry.allow_truncation:
                raise UserError(
                    f"task {entry.title}: a prompt of {len(ids):,} tokens and an answer of {new} need more than "
                    f"max_length {max_length:,}: raise max_length, or set allow_truncation: true"
                )
            truncated += 1
            # A prompt that fits keeps its whole; its answer gets what is left.
            new = max(max_length - len(ids), max_length // 4)
            ids = ids[-(max_length - new) :]
        questions.append(Question(tuple(ids), task.stops, new))
    own = ranks.own_part([len(one.prompt) + one.max_new_tokens for one in questions])
    texts = answer(loaded, questions[own.start : own.stop], setting.advance)
    outcomes = [run_program(task.program(rows[place], text)) for place, text in zip(own, texts, strict=True)]
    mine = {place: (text, one) for place, text, one in zip(own, texts, outcomes, strict=True)}
    found = ranks.merged(mine)
    items = [
        Item(entry.title, str(row.get("task_id", row.get("id", place))), "pass@1", float(found[place][1].passed))
        for place, row in enumerate(rows)
    ]
    samples = [
        {"doc_id": place, "doc": row, "answer": found[place][0], "passed": found[place][1].passed}
        | {"reason": found[place][1].reason}
        for place, row in enumerate(rows)
    ]
    facts = {"data": str(data), "data_sha256": data_digest(manifest), "truncated": truncated}
    metrics = summarise(items, num_shots=shots, num_truncated=truncated)
    return TaskResult(items, metrics, facts, {"samples": {entry.title: samples}}, _beyond(loaded, max_length))


def _rows(folder: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
    texts = {str(folder / path): (folder / path).read_text(encoding="utf-8") for path in paths}
    return [row for path, text in texts.items() for row in convert("", text, path)]
