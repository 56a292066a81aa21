"""A suite's file: which tasks, with how many shots and items, at which lengths; `configs/eval/` has examples."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from engram.config import Count, Index, Name, Seed, Settings
from engram.config_file import ConfigError, explain, read_mapping
from eval.benchmarks.catalogue import FOLDER, benchmarks, unknown
from eval.benchmarks.packages import PACKAGES

# Tasks that need no data but the run's own.
NATIVE = ("perplexity", "facts", "ruler", "long_ppl")
# Keys of tasks that ask questions.
_ASKED = ("shots", "limit", "max_length", "allow_truncation", "yaml", "data")
# Keys of those that measure texts, or make their questions themselves.
_USED: dict[str, tuple[str, ...]] = {
    "perplexity": ("lengths", "tokens", "data"),
    "facts": (),
    "ruler": ("lengths", "limit", "profile", "essay", "squad", "hotpot"),
    "long_ppl": ("lengths", "tokens", "data", "evaluator"),
}
Level = Annotated[float, Field(gt=0.5, lt=1)]


class Entry(Settings):
    """One task of a suite; keys that its task does not use are refused."""

    # perplexity, facts, ruler, long_ppl, a benchmark (python -m eval verify-data lists them), or any name where `yaml`
    # is given.
    task: Name
    # How the results call it; null: as the task. Two entries of one task need two names.
    name: str | None = None
    # Few-shot examples; null: as in the paper.
    shots: Index | None = None
    # Items at most, of each subset; null: all. ruler: samples of each task and length, null: 50.
    limit: Count | None = None
    # Tokens that the model reads at once; null: its sequence length in training.
    max_length: Count | None = None
    # Cut the beginnings of what is too long, and count it, instead of stopping with a message.
    allow_truncation: bool = False
    # perplexity, ruler, long_ppl: the lengths of rows, samples or documents; empty: the sequence length in training.
    lengths: tuple[Count, ...] = ()
    # perplexity, long_ppl: tokens at most.
    tokens: Count | None = None
    # ruler: short wording or NVIDIA's; a text that hides needles, SQuAD's dev-v2.0.json, hotpot_dev_distractor_v1.json.
    # Without these files, texts and questions are invented.
    profile: Literal["tiny", "full"] = "tiny"
    essay: Path | None = None
    squad: Path | None = None
    hotpot: Path | None = None
    # long_ppl: the checkpoint or run folder that says which tokens need a long context.
    evaluator: Path | None = None
    # perplexity, long_ppl: prepared data; null: what the model was trained on. Others: a folder with a manifest.json.
    data: Path | None = None
    # Any lm-eval task: a file of yours, or the file (a pattern: the files of its subsets) below lm_eval/tasks.
    yaml: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.task

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.yaml is None and self.task not in NATIVE:
            known = benchmarks()
            if self.task not in known and self.task not in PACKAGES:
                runnable = [name for name, one in known.items() if one.run not in ("internal", "text")]
                shipped = [name for name in PACKAGES if name not in known]
                raise ValueError(str(unknown("task", self.task, [*NATIVE, *runnable, *shipped])))
            if self.task in known and known[self.task].run == "internal":
                raise ValueError(f"task {self.task} cannot be run: {known[self.task].note}")
            if self.task in known and known[self.task].run == "text":
                raise ValueError(
                    f"task {self.task}: losses on texts are measured by task perplexity: name it, with data"
                )
        if self.task == "long_ppl" and self.evaluator is None:
            raise ValueError("task long_ppl needs an evaluator: the checkpoint that says which tokens are measured")
        used = _USED.get(self.task, _ASKED)
        for key in (*_ASKED, *(name for names in _USED.values() for name in names)):
            if key in used:
                continue
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"task {self.task} has no {key}: leave it out")
        return self


class Suite(Settings):
    """All tasks of one command, and how two checkpoints are compared."""

    tasks: Annotated[tuple[Entry, ...], Field(min_length=1)]
    # Where benchmarks lie.
    data: Path = FOLDER
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Tokens that pass through the model at once: less needs less memory.
    max_tokens: Count = 8192
    # Of the intervals, and of the bootstrap behind them.
    level: Level = 0.95
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        titles = [entry.title for entry in self.tasks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two tasks are called {title!r}: give one of them another `name`")
        return self


def load_suite(path: Path) -> Suite:
    """Raises ConfigError: not readable, or a mistake in it, one line for each."""
    tree: dict[str, Any] = read_mapping(path)
    try:
        return Suite(**tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, Suite))) from None
