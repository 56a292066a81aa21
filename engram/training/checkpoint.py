"""Checkpoints: whoever loads one gets the very model that was saved, or a message that says what does not fit.

A checkpoint alone suffices to generate text: it carries config, tokenizer and vocabulary map. The hash recipe is
compared on every load, because a drifted tokenizer or multiplier would silently re-address every row of the tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engram.config import Config
from engram.data.tokenizer import Tokenizer, load_tokenizer
from engram.distributed.world import SINGLE, World
from engram.memory.mapped_table import MappedTable
from engram.memory.vocabulary import VocabularyMap
from engram.model.transformer import Transformer
from engram.training.checkpoint_files import (
    CHECKSUMS,
    CheckpointError,
    latest_checkpoint,
    other_checkpoint,
    read_config,
    read_state,
    tensor_files,
    verify,
)
from engram.training.tensor_files import TensorFiles

__all__ = ["Checkpoint", "CheckpointError", "latest_checkpoint", "load_model", "model_of", "open_checkpoint"]

# Counts changes of what a checkpoint holds.
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole."""

    folder: Path
    config: Config
    # step, tokens, loader, optimizer, rng, hash_recipe, tokenizer_digest, environment, ...
    state: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.folder)

    def tensors(self, name: str) -> TensorFiles:
        """Tensors of `model` or `optim`, each read when it is asked for."""
        return tensor_files(self.folder, name)

    def vocabulary(self) -> VocabularyMap:
        """The map from token ids to the compressed ids whose n-grams were hashed."""
        return VocabularyMap(self.tensors("model")["token_map"].numpy())

    def fill(self, model: Transformer, apart: Mapping[str, torch.Size] | None = None) -> None:
        """Copy the weights into `model`. Raises CheckpointError: another hash recipe, names or shapes.

        `apart`: shapes of the tensors that somebody else takes over.
        """
        apart = apart or {}
        self.check(model, {name: tensor.shape for name, tensor in model.state_dict().items()} | dict(apart))
        model.load_state_dict(dict(self.tensors("model").only(lambda name: name not in apart)), strict=not apart)

    def check(self, model: Transformer, needed: Mapping[str, torch.Size]) -> None:
        """Raises CheckpointError where hash recipe, names or shapes are not those of `model`, of shapes `needed`."""
        self._compare_recipes(hash_recipe(model))
        found = self.tensors("model").shapes()
        problems = [f"{name}: only in the checkpoint" for name in found.keys() - needed.keys()]
        problems += [f"{name}: only in the model" for name in needed.keys() - found.keys()]
        problems += [
            f"{name}: {list(found[name])} in the checkpoint, {list(needed[name])} in the model"
            for name in found.keys() & needed.keys()
            if found[name] != needed[name]
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder / 'model.safetensors'}: does not fit the model of its config:\n  "
                + "\n  ".join(sorted(problems))
                + "\nuse the code of the commit in the run's code.json"
            )

    def _compare_recipes(self, recipe: dict[str, str]) -> None:
        for part, digest in recipe.items():
            if (saved := self.state["hash_recipe"].get(part)) != digest:
                raise CheckpointError(
                    f"{self.folder / 'state.json'}: the hash recipe of {part} was {str(saved)[:12]}..., but is now "
                    f"{digest[:12]}...: every n-gram would read other rows. Use the tokenizer and code that trained it"
                )


def open_checkpoint(path: str | Path, world: World = SINGLE) -> Checkpoint:
    """The checkpoint at `path`, or the latest of the run folder at `path`, after comparing all checksums.

    Of several ranks, each compares its part of them: what one of them raises, all must learn of. Raises
    CheckpointError: none there, a file missing or damaged, written by other code.
    """
    folder = Path(path)
    if not (folder / CHECKSUMS).exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: does not exist: give a run folder or one of its step_... folders")
        folder = latest_checkpoint(folder) or folder
    verify(folder, world)
    state = read_state(folder)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'state.json'}: is of format {state.get('format')}, but this code reads format {FORMAT}: use "
            "the code of the commit in the run's code.json"
        )
    if not isinstance(state.get("step"), int) or not isinstance(state.get("hash_recipe"), dict):
        raise CheckpointError(f"{folder / 'state.json'}: is damaged: {other_checkpoint(folder)}")
    return Checkpoint(folder, read_config(folder), state)


def load_model(checkpoint_dir: str | Path) -> Transformer:
    """The model of a checkpoint, or of a run folder's latest: float32, in eval mode, with its vocabulary map.

    Raises CheckpointError.
    """
    return model_of(open_checkpoint(checkpoint_dir))


def model_of(checkpoint: Checkpoint, tables: Literal["memory", "file"] = "memory") -> Transformer:
    """The checkpoint's model in eval mode. `tables`: rows of the memory layers in memory, or left in the files, which
    must then stay there, and read one by one. Raises CheckpointError.
    """
    model, vocabulary = checkpoint.config.model, checkpoint.vocabulary()
    if tables == "memory" or model.memory is None:
        built = Transformer(model, vocabulary)
        checkpoint.fill(built)
        return built.eval()
    built = Transformer(model, vocabulary, MappedTable)
    mapped = {f"{name}.weight": table for name, table in built.named_modules() if isinstance(table, MappedTable)}
    checkpoint.fill(built, {name: torch.Size((table.num_rows, table.head_dim)) for name, table in mapped.items()})
    saved = checkpoint.tensors("model")
    for name, table in mapped.items():
        table.place(saved.mapped(name))
    return built.eval()


def hash_recipe(model: Transformer) -> dict[str, str]:
    """Digests of all that decides which rows a token reads; the vocabulary map's is there with and without tables."""
    recipe = {"vocabulary": model.vocabulary.digest}
    if model.hasher is not None:
        recipe["memory"] = model.hasher.fingerprint()
    if model.over_encoding is not None:
        recipe["over_encoding"] = model.over_encoding.hasher.fingerprint()
    return recipe
