"""What a run is made of, before its first step: process, data, model."""

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from engram.config import Config, ModelConfig, TrainConfig
from engram.data.manifest import NAME, read_manifest
from engram.data.prepare import prepare
from engram.data.settings import check_settings, content_settings
from engram.data.shards import Dataset, verify_folder
from engram.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from engram.memory.vocabulary import VocabularyMap
from engram.model.transformer import Transformer
from engram.training.run_folder import cpu_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    training: Dataset
    validation: Dataset
    tokenizer: Tokenizer


def configure_process(train: TrainConfig) -> None:
    """Threads, denormal numbers and memory allocation of this process."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    # The backward pass of saturated logits is full of denormals, each a hundred times as slow as a number.
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def open_data(config: Config, terminal: Console) -> RunData:
    """The prepared folder of `data.path`, prepared now if it is not there yet. Raises UserError."""
    folder = Path(config.data.path).expanduser()
    if not (folder / NAME).exists():
        logger.info("%s holds no prepared data yet: preparing it", folder)
        prepare(config, console=terminal)
    check_settings(folder, read_manifest(folder).settings, content_settings(config))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.model.vocab_size, str(folder))
    # Sizes alone do not tell a damaged shard, and reading everything once takes less than a few steps.
    verify_folder(folder)
    size = tokenizer.vocab_size
    training, validation = (Dataset(folder, split, vocab_size=size) for split in ("train", "validation"))
    return RunData(training, validation, tokenizer)


def build_model(config: Config, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The freshly initialised model, ready to train: float32 masters, computing in train.dtype."""
    model = Transformer(config.model, vocabulary_map(config.model, tokenizer)).to(device)
    model.compute_dtype = getattr(torch, config.train.dtype)
    model.activation_checkpointing = config.train.activation_checkpointing
    model.set_dense_table_gradients(config.optim.table.kind == "dense_adam")
    if config.train.compile:
        model.compile_blocks()
    return model.train()


def vocabulary_map(model: ModelConfig, tokenizer: Tokenizer) -> VocabularyMap | None:
    """Compressed ids, where the model's tables ask for them."""
    wanted = any(tables is not None and tables.compression for tables in (model.memory, model.over_encoding))
    return VocabularyMap.from_texts(tokenizer.texts(), tokenizer.raw_tokens()) if wanted else None


def environment(device: torch.device) -> dict[str, str | int]:
    """What bitwise resume depends on besides the config."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
    }


def _keep_freed_memory() -> None:
    """Let glibc reuse big blocks; else every activation maps and zeroes its pages anew (5 to 10 % of a step)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # Another C library.
        return
    mmap_threshold, trim_threshold = -3, -1
    # Older versions take 32 MiB at most.
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
        mallopt(trim_threshold, (1 << 31) - 1)
