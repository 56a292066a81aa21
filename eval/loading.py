"""A checkpoint as evaluation needs it: model on its device, tokenizer, config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engram.config import Config, UserError
from engram.data.shards import Dataset
from engram.data.tokenizer import Tokenizer, check_vocabulary
from engram.model.device import choose_device
from engram.model.transformer import Transformer
from engram.training.checkpoint import model_of, open_checkpoint


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with what it was trained with."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises UserError where there are none, or the prompt is no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text's character {error.start} is {text[error.start]!r}, half of a surrogate pair: "
                "give valid UTF-8"
            ) from None
        ids = self.tokenizer.encode(text)
        if not ids:
            raise UserError("the text is empty: give at least one character")
        return ids

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """Text that `tokens` add to the prompt that they begin with, without the end-of-document token."""
        kept = [token for token in tokens[len(prompt) :] if token != self.tokenizer.eos_id]
        return self.tokenizer.decode([*prompt, *kept]).removeprefix(self.tokenizer.decode(prompt))


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "float32",
    threads: int | None = None,
    tables: Literal["memory", "file"] = "memory",
) -> Loaded:
    """Load a checkpoint, or the latest of a run folder. `threads`: of the CPU; None: as many as in training.

    `tables`: rows of memory layers in memory, or left in the checkpoint's files and read as they are asked for.

    Raises UserError: no checkpoint, damaged, another tokenizer, no such device.
    """
    checkpoint = open_checkpoint(path)
    threads = threads or checkpoint.config.train.threads
    if threads is not None:
        torch.set_num_threads(threads)
    model = model_of(checkpoint, tables)
    model.compute_dtype = getattr(torch, dtype)
    tokenizer = checkpoint.tokenizer()
    check_vocabulary(tokenizer, checkpoint.config.model.vocab_size, str(checkpoint.folder))
    model = model.to(choose_device(device, "--device"))
    return Loaded(checkpoint.folder, model, tokenizer, checkpoint.config, int(checkpoint.state["step"]))


def beyond_training(loaded: Loaded, length: int) -> str | None:
    """What to say where a model reads more tokens at once than it did in training; None where it does not."""
    trained = loaded.config.data.sequence_length
    if length <= trained:
        return None
    return (
        f"{length:,} tokens are read at once, but {loaded.folder} was trained on {trained:,}: positions beyond are new"
    )


def open_split(folder: str | Path, tokenizer: Tokenizer, split: str = "validation") -> Dataset:
    """A split of a prepared folder. Raises UserError: not prepared, damaged, or made with another tokenizer."""
    dataset = Dataset(folder, "train" if split == "train" else "validation", verify=True)
    if dataset.manifest.tokenizer.digest != tokenizer.digest:
        raise UserError(
            f"{folder}: was prepared with tokenizer {dataset.manifest.tokenizer.digest[:12]}..., but the checkpoint "
            f"was trained with {tokenizer.digest[:12]}...: give the data that belongs to the checkpoint with --data"
        )
    return dataset


def check_target(path: Path) -> None:
    """Raise UserError, before anything is measured, where a page cannot stand."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file with --out, such as {path / 'page.html'}")
    # Tables and figures get the page's name with other endings: it must have one of its own.
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: a page is an .html file: name one with --out, such as {path.with_suffix('.html')}")


def check_rows(dataset: Dataset, sequence_length: int, tokens: int | None) -> None:
    """Raise UserError, before anything is measured, where --tokens or the split is less than one row."""
    if tokens is not None and tokens < sequence_length:
        raise UserError(f"--tokens is {tokens:,}, less than one row of --sequence-length {sequence_length:,}: raise it")
    if dataset.num_tokens <= sequence_length:
        raise UserError(
            f"{dataset.folder}: the {dataset.split} split has {dataset.num_tokens:,} tokens, but one row of "
            f"--sequence-length {sequence_length:,} needs {sequence_length + 1:,}: lower it, or give other --data"
        )
