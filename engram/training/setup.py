"""What a run is made of, before its first step: process, data, model."""

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from engram.config import Config, ModelConfig, TrainConfig, UserError
from engram.data.manifest import NAME, read_manifest
from engram.data.prepare import prepare
from engram.data.settings import check_settings, content_settings
from engram.data.shards import Dataset, verify_folder
from engram.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from engram.distributed.plan import Plan
from engram.distributed.world import World
from engram.kernels.products import needs_widening
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable
from engram.memory.vocabulary import VocabularyMap
from engram.model.transformer import Transformer
from engram.optim.optimizer import build_optimizer
from engram.training.capacity import SMALLER, check_memory, explain_out_of_memory
from engram.training.engine import Engine, LocalEngine
from engram.training.provenance import cpu_name
from engram.training.staged import StagedRows
from engram.training.stored_tables import StoredTables

logger = logging.getLogger(__name__)

# More than this many is a typing error.
THREADS_PER_CPU = 16


@dataclass(frozen=True)
class RunData:
    training: Dataset
    validation: Dataset
    tokenizer: Tokenizer


def configure_process(train: TrainConfig) -> None:
    """Threads, denormal numbers and memory allocation of this process. Raises UserError for too many threads."""
    if train.threads is not None:
        cpus = os.cpu_count() or 1
        # Thread pools fail with a crash, not with an error.
        if train.threads > (most := THREADS_PER_CPU * cpus):
            raise UserError(
                f"train.threads is {train.threads}, but this machine has {cpus} CPUs: lower it to {most} at "
                f"most, best to {cpus}"
            )
        torch.set_num_threads(train.threads)
    # The backward pass of saturated logits is full of denormals, each a hundred times as slow as a number.
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def open_data(config: Config, terminal: Console) -> RunData:
    """The prepared folder of `data.path`, prepared now if it is not there yet. Raises UserError."""
    folder = Path(config.data.path).expanduser()
    if not (folder / NAME).exists():
        state = "holds no prepared data yet" if folder.exists() else "does not exist yet"
        logger.info("data.path %s %s: preparing it", folder, state)
        prepare(config, console=terminal)
    check_settings(folder, read_manifest(folder).settings, content_settings(config))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.model.vocab_size, str(folder))
    # Sizes alone do not tell a damaged shard, and reading everything once takes less than a few steps.
    verify_folder(folder)
    size = tokenizer.vocab_size
    training, validation = (Dataset(folder, split, vocab_size=size) for split in ("train", "validation"))
    return RunData(training, validation, tokenizer)


def build_model(
    config: Config, tokenizer: Tokenizer, device: torch.device, table: Callable[..., RowTable | StagedTable] = RowTable
) -> Transformer:
    """The freshly initialised model, ready to train: float32 masters, computing in train.dtype.

    `table` makes the tables of memory layers.
    """
    model = Transformer(config.model, vocabulary_map(config.model, tokenizer), table)
    if config.distributed is not None and config.distributed.zero_stage == 3:
        move_around_backbone(model, device)
    else:
        model.to(device)
    model.compute_dtype = getattr(torch, config.train.dtype)
    if needs_widening(device.type, model.compute_dtype):
        logger.info("products of bfloat16 matrices run in float32, as this processor has no instructions for them")
    model.activation_checkpointing = config.train.activation_checkpointing
    model.set_dense_table_gradients(config.optim.table.kind == "dense_adam")
    if config.train.compile:
        if (obstacle := _compile_obstacle(device)) is None:
            model.compile_blocks()
            logger.info(
                "train.compile: the first step waits a minute or two for the compiler, less where it has cached"
            )
        else:
            logger.warning("train.compile has no effect, and steps are slower: %s", obstacle)
    return model.train()


def move_around_backbone(model: Transformer, device: torch.device) -> None:
    """Tables and buffers to the device. The backbone stays in host memory: ZeRO 3 brings over what a rank keeps."""
    for module in model.modules():
        if isinstance(module, RowTable | StagedTable):
            module.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)


def build_engine(plan: Plan, data: RunData, device: torch.device, world: World) -> Engine:
    """The model with its optimizer, on this process or on all ranks. Raises UserError: memory, roles."""
    config = plan.config
    # All look before any of them takes.
    with world.together():
        needed = check_memory(plan, world.rank, world.here, device)
    with explain_out_of_memory(f"{needed}, and the {device.type} ran out of memory: {SMALLER}"):
        stored = StoredTables(config, world)
        model = build_model(config, data.tokenizer, device, stored.make)
        if config.distributed is not None:
            # It brings DeepSpeed, which takes seconds to import.
            from engram.training.ranked_engine import RankedEngine

            # Some have more rows to make room for than others.
            world.meet()
            return RankedEngine(model, config, device, world, stored)
        optimizer = build_optimizer(model.named_parameters(), config.optim, stored.parts())
        stored.bind(optimizer.tensors())
    at_once = config.train.micro_batch_size or config.train.batch_size
    rows = StagedRows(model, stored.steps, device)
    return LocalEngine(model, optimizer, device, at_once, config.optim.clip_norm, rows, stored)


def _compile_obstacle(device: torch.device) -> str | None:
    """Why torch cannot compile for this device; None if it can."""
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, ValueError, OSError):
        chosen = os.environ.get("CXX")
        what = f"CXX names {chosen!r}, which does not run" if chosen else "no C++ compiler (g++) was found"
        return f"{what}; install one, or set train.compile=false"
    return None


def vocabulary_map(model: ModelConfig, tokenizer: Tokenizer) -> VocabularyMap | None:
    """Compressed ids, where the model's tables ask for them."""
    wanted = any(tables is not None and tables.compression for tables in (model.memory, model.over_encoding))
    return VocabularyMap.from_texts(tokenizer.texts(), tokenizer.raw_tokens()) if wanted else None


def environment(device: torch.device, ranks: int = 1) -> dict[str, str | int]:
    """What bitwise resume depends on besides the config."""
    facts: dict[str, str | int] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
    }
    return facts if ranks == 1 else facts | {"ranks": ranks}


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
