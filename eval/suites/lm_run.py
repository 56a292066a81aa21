"""Running lm-eval's evaluator on local tasks, and reading what it leaves as items and metrics."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from engram.config import UserError
from engram.training.files import write_atomically
from eval.results import Item, Metric
from eval.suites.lm_tasks import LocalTask, lm_eval_tasks

# Those of lm-eval's command line.
_SEEDS = dict(random_seed=0, numpy_seed=1234, fewshot_seed=1234)
# Draws for the standard errors of metrics that are no means; ours come from eval/bootstrap.py.
_BOOTSTRAP = 100
# What questions of a benchmark share: a text, or a problem in several languages.
_FAMILIES = {"race_middle": "article", "race_high": "article", "c3": "document", "drop": "passage", "mgsm": "doc_id"}


def run_tasks(lm: Any, tasks: Sequence[LocalTask], limit: int | None) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns for all tasks, with samples, and its settings.

    Raises UserError where lm-eval or a package that a task needs is missing, or a row is not as its task wants it.
    """
    lm_eval_tasks()
    with _offline(), tempfile.TemporaryDirectory() as cache, _quiet():
        import lm_eval
        from datasets import config as datasets_config
        from lm_eval.tasks import TaskManager

        before = datasets_config.HF_DATASETS_CACHE
        # Copies of the data in its own format: nobody reads them a second time.
        datasets_config.HF_DATASETS_CACHE = Path(cache)
        try:
            random.seed(_SEEDS["random_seed"])
            np.random.seed(_SEEDS["numpy_seed"])
            loaded = TaskManager(include_defaults=False).load([str(task.path) for task in tasks])
            for one in loaded["tasks"].values():
                one.set_fewshot_seed(seed=_SEEDS["fewshot_seed"])
            # Not `simple_evaluate`, which collects facts about the machine for seconds, in the first process alone.
            found = lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=True)
        except UserError:
            raise
        except (MemoryError, RuntimeError):
            # The model's, not the data's: with its traceback.
            raise
        except ModuleNotFoundError as error:
            raise UserError(f"a task needs the package {error.name!r}: pip install it, or leave the task out") from None
        except Exception as error:
            if (full := _full_disk(error)) is not None:
                raise full from None
            names = ", ".join(dict.fromkeys(task.benchmark for task in tasks))
            raise UserError(
                f"lm-eval cannot run {names} on this data ({type(error).__name__}: {error}): the rows must have the "
                "columns that its task reads"
            ) from error
        finally:
            datasets_config.HF_DATASETS_CACHE = before
    assert found is not None
    config = {"model": type(lm).__name__, "limit": limit, "bootstrap_iters": _BOOTSTRAP, **_SEEDS}
    return {**found, "config": config, "lm_eval_version": lm_eval.__version__, "date": time.time()}


def _full_disk(error: BaseException | None) -> OSError | None:
    """What stands behind an error of a library that could not write its own copy of the data."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def items_of(found: Mapping[str, Any], tasks: Sequence[LocalTask], name: str) -> list[Item]:
    """One item for each document, metric and filter; equal documents are told apart by their order."""
    items = []
    for task in tasks:
        seen: Counter[tuple[str, str]] = Counter()
        for sample in found["samples"][task.name]:
            key = sample["doc_hash"], sample["filter"]
            identity = f"{task.subset}:{sample['doc_hash'][:16]}:{seen[key]}"
            seen[key] += 1
            unit = _unit(task, sample)
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, int | float):
                    shown = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                    items.append(Item(name, identity, shown, float(value), task.subset, unit=unit))
                elif metric == "bits_per_byte":
                    # A text's log-likelihood in nats, and its bytes.
                    bits, weight = -value[0] / math.log(2) / value[1], float(value[1])
                    items.append(Item(name, identity, metric, bits, task.subset, weight, unit))
    return items


def corpus_metrics(found: Mapping[str, Any], tasks: Sequence[LocalTask], name: str) -> list[Metric]:
    """Perplexities of whole corpora, which are no means over documents, as lm-eval computes them."""
    metrics = []
    for task in tasks:
        for metric in ("word_perplexity", "byte_perplexity"):
            if (value := found["results"][task.name].get(f"{metric},none")) is not None:
                n = len(found["samples"][task.name])
                metrics.append(Metric(name, metric, float(value), math.nan, n, task.subset, higher_is_better=False))
    return metrics


def _unit(task: LocalTask, sample: Mapping[str, Any]) -> str:
    """What several questions have in common, so that they are drawn together; empty: nothing."""
    shared = _FAMILIES.get(task.benchmark)
    if shared is None:
        return ""
    what = sample["doc_id"] if shared == "doc_id" else sample["doc"][shared]
    return hashlib.sha256(str(what).encode()).hexdigest()[:16]


def answer_items(found: Mapping[str, Any], tasks: Sequence[LocalTask], name: str) -> list[Item]:
    """For multiple choice, what moves before accuracy does: `gold_bits_per_byte` of the right answer and `margin`,
    its log-probability in nats above the best wrong answer's."""
    items = []
    for task in tasks:
        seen: Counter[str] = Counter()
        for sample in found["samples"][task.name]:
            target, answers = sample["target"], sample["filtered_resps"]
            texts = [arguments[1] for arguments in sample["arguments"] if len(arguments) == 2]
            if not isinstance(target, int) or isinstance(target, bool) or len(texts) != len(answers) or len(texts) < 2:
                continue
            if not 0 <= target < len(answers) or not all(isinstance(one, list | tuple) for one in answers):
                continue
            identity = f"{task.subset}:{sample['doc_hash'][:16]}:{seen[sample['doc_hash']]}"
            seen[sample["doc_hash"]] += 1
            unit = _unit(task, sample)
            logprobs = [float(one[0]) for one in answers]
            wrong = max(logprob for place, logprob in enumerate(logprobs) if place != target)
            bits = -logprobs[target] / math.log(2) / len(texts[target].encode())
            items.append(Item(name, identity, "gold_bits_per_byte", bits, task.subset, unit=unit))
            items.append(Item(name, identity, "margin", logprobs[target] - wrong, task.subset, unit=unit))
    return items


def write_lm_eval_files(
    folder: Path, found: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], now: datetime
) -> None:
    """`results_<time>.json` and `samples_<task>_<time>.jsonl`, in the shape that lm-eval's own tools read.

    `found`: what was returned for each task of a suite; the tables of all stand in one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = now.isoformat().replace(":", "-")
    results: dict[str, Any] = {}
    for one in found:
        for key, value in one.items():
            if key != "samples":
                results[key] = {**results.get(key, {}), **value} if isinstance(value, Mapping) else value
        for task, samples in one["samples"].items():
            lines = "".join(json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples)
            write_atomically(folder / f"samples_{task}_{stamp}.jsonl", lines)
    results |= extra
    write_atomically(folder / f"results_{stamp}.json", json.dumps(results, indent=1, default=str, ensure_ascii=False))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Local files only, whatever a task asks for: what these libraries read when they are imported."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' lines and bars: progress is shown by our own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
