"""LongPPL as a task of a suite: perplexity of the tokens that one evaluator finds to need a long context."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram.config import UserError
from eval.documents import document_id, read_documents
from eval.loading import Loaded, load, open_split
from eval.long_ppl.cache import documents_digest, evaluator_losses
from eval.long_ppl.measure import Windows, long_ppl, whole_losses
from eval.results import Item, Metric
from eval.score_cache import checkpoint_digest
from eval.suites.settings import Entry

# LongPPL's own thresholds, in nats: what the long context adds, and the log-probability that must be passed.
ALPHA, BETA = 2.0, -2.0


def long_ppl_results(
    loaded: Loaded, entry: Entry, context: int, data: str | Path, cache: Path, device: str, max_tokens: int
) -> tuple[list[Item], list[Metric], dict[str, Any]]:
    """Each document's mean loss over its key tokens and over all; `long_ppl` and `perplexity` over all documents.

    The short context is an eighth to five thirty-seconds of `context`, in tokens. Raises UserError: another tokenizer
    than the evaluator's, a context beyond a model's, no document longer than the short context.
    """
    assert entry.evaluator is not None
    # Threads are the process's: the evaluator's own setting must not change the model's.
    evaluator = load(entry.evaluator, device, "float32", torch.get_num_threads())
    for one, name in ((loaded, "the model"), (evaluator, "the evaluator")):
        if context > one.config.data.sequence_length:
            raise UserError(
                f"task {entry.title}: its length is {context:,} tokens, but {name} {one.folder} was trained with "
                f"{one.config.data.sequence_length:,}: lower `lengths`"
            )
    if evaluator.tokenizer.digest != loaded.tokenizer.digest:
        raise UserError(
            f"task {entry.title}: {evaluator.folder} has another tokenizer than {loaded.folder}: key tokens are those "
            "of one tokenizer; name an evaluator of the same"
        )
    windows = Windows(max(1, context // 8), max(1, context // 32))
    dataset = open_split(data, loaded.tokenizer)
    documents = read_documents(dataset, context, entry.tokens, min_length=windows.window + windows.stride + 1)
    masks = [each.key(ALPHA, BETA) for each in evaluator_losses(evaluator, documents, windows, cache)]
    place = loaded.model.head.weight.device
    losses = whole_losses(loaded.model, documents, windows.window, max_tokens, place)
    found, task = long_ppl(losses, masks), f"{entry.title}@{context}"
    items = [
        Item(task, document_id(place, documents[place]), metric, total / count, weight=count)
        for metric, sums, counts in (
            ("document_key_loss", found.key_sums, found.key_counts),
            ("document_loss", found.all_sums, found.all_counts),
        )
        for place, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True))
        if count
    ]
    metrics = [
        Metric(task, name, value, float("nan"), n, higher_is_better=False)
        for name, value, n in (
            ("long_ppl", found.long_ppl, found.key_tokens),
            ("perplexity", found.ppl, int(np.sum(found.all_counts))),
        )
    ]
    facts = {
        "data": str(dataset.folder),
        "documents_sha256": documents_digest(documents),
        "evaluator": str(evaluator.folder),
        "evaluator_sha256": checkpoint_digest(evaluator.folder),
        "window": windows.window,
        "stride": windows.stride,
        "alpha": ALPHA,
        "beta": BETA,
        "key_rate": found.key_rate,
    }
    return items, metrics, facts
