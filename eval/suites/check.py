"""What a suite needs and does not have, before anything is computed: hours later is too late to say it."""

from collections.abc import Sequence
from pathlib import Path

from engram.config import UserError
from engram.training.checkpoint import open_checkpoint
from eval.benchmarks.code import CODE_TASKS
from eval.benchmarks.manifest import MANIFEST, whole
from eval.benchmarks.packages import PACKAGES
from eval.ruler.tasks import read_sources
from eval.suites.lm_tasks import lm_eval_tasks
from eval.suites.settings import NATIVE, Entry, Suite


def check_suite(suite: Suite, run_code: bool) -> None:
    """Raise UserError: data that is missing, of all tasks in one message, or altered; no evaluator, no source of
    RULER's texts; programs that may not run; no lm-eval."""
    asked = [entry for entry in suite.tasks if entry.task not in NATIVE or entry.yaml is not None]
    missing = [entry for entry in asked if not (data_folder(suite, entry) / MANIFEST).is_file()]
    if missing:
        lines = "\n".join(f"  {entry.title}: {_how(entry)}" for entry in missing)
        raise UserError(
            f"{len(missing)} of {len(suite.tasks)} tasks have no data in {suite.data}:\n{lines}\nadd it (python -m "
            "eval verify-data lists what is there), or leave these tasks out of the suite's file"
        )
    # Reading everything once takes seconds, and what follows may take hours.
    for entry in asked:
        whole(data_folder(suite, entry))
    for entry in suite.tasks:
        read_sources(entry.essay, entry.squad, entry.hotpot)
        if entry.evaluator is not None:
            open_checkpoint(entry.evaluator)
    for entry in asked:
        if is_code(entry) and not run_code:
            raise UserError(
                f"task {entry.title} runs programs that the model wrote: allow it with --run-code (eval/benchmarks/"
                "sandbox.py says what keeps them apart from this machine), or leave the task out"
            )
    if any(not is_code(entry) for entry in asked):
        lm_eval_tasks()


def check_texts(suite: Suite, paths: Sequence[str | Path]) -> str:
    """The prepared data that all models read where the suite names none: the first model's.

    Raises UserError where models of different tokenizers would be compared on tokens.
    """
    opened = [open_checkpoint(path) for path in paths]
    tokens = [entry.title for entry in suite.tasks if entry.task in NATIVE and entry.task != "facts"]
    if tokens and len({one.tokenizer().digest for one in opened}) > 1:
        raise UserError(
            f"{' and '.join(str(one.folder) for one in opened)} have different tokenizers: {', '.join(tokens)} compare "
            "token by token; give models of one tokenizer, or leave these tasks out"
        )
    return opened[0].config.data.path


def data_folder(suite: Suite, entry: Entry) -> Path:
    """Where a benchmark's data lies."""
    return entry.data or suite.data / entry.task


def is_code(entry: Entry) -> bool:
    """Whether the model's answers are programs, which are run."""
    return entry.task in CODE_TASKS and entry.yaml is None


def _how(entry: Entry) -> str:
    if entry.task in PACKAGES and entry.data is None:
        return f"python -m eval add-data {entry.task} ({PACKAGES[entry.task].megabytes:g} MB)"
    return f"bring its files: python -m eval add-data {entry.task} --file SPLIT=FILE"
