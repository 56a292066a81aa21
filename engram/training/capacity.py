"""Whether a run fits into memory: asked before it starts, explained where it turns out not to."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from engram.config import Config, UserError
from engram.distributed.accounting import held_at_start, held_by
from engram.distributed.plan import Plan
from engram.training.free_memory import free_memory

# CPUs that are out of memory raise a plain RuntimeError, and so do some of CUDA's libraries.
_COMPLAINTS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


def check_memory(plan: Plan, rank: int, here: Sequence[int], device: torch.device) -> str:
    """Raises UserError where weights, optimizer state and the least that a step takes do not fit into free memory.

    Returns how much that is, as the beginning of a message.

    `here`: the ranks of this machine, `rank` among them. They share its memory, which on CPU is all there is.
    """
    shared = device.type == "cpu"
    host = sum(each.host for other in here for each in held_by(plan, other))
    needed = sum(
        each.parameters + each.gradients + each.state
        for holder in (here if shared else [rank])
        for each in held_by(plan, holder)
    )
    if shared:
        needed, host = needed + host, 0
    step = least_step_bytes(plan) * (len(here) if shared else 1)
    free = free_memory(device)
    who = f"the {len(here)} ranks of this machine need" if shared and len(here) > 1 else "the run needs"
    message = f"{who} {_gib(needed)} for weights, gradients and optimizer state"
    if free is not None and needed > free:
        storage = plan.config.train.tables
        filed = "set train.tables.tier to file, or " if shared and storage and storage.tier == "host" else ""
        raise UserError(f"{message}, but only {_gib(free)} are free on {device.type}: {filed}{SMALLER}")
    if free is not None and needed + step > free:
        raise UserError(
            f"{message}, and {_gib(step)} or more for a training step, but only {_gib(free)} are free on "
            f"{device.type}: lower {_smaller_step(plan.config)}"
        )
    free = free_memory(torch.device("cpu"))
    if free is not None and host > free:
        raise UserError(
            f"the ranks of this machine keep {_gib(host)} of table rows, optimizer state and copies for checkpoints in "
            f"host memory, but only {_gib(free)} are free: set train.tables.tier to file and train.async_checkpoints "
            "to false, or divide the tables among more machines"
        )
    if free is not None and (starting := sum(held_at_start(plan, other) for other in here)) > free:
        raise UserError(
            "before ranks divide the backbone, each of them has the whole in host memory, and its table rows: "
            f"{_gib(starting)} for the {len(here)} of this machine, but only {_gib(free)} are free: start fewer ranks "
            "on each machine"
        )
    return message


SMALLER = "lower model.hidden_size, model.num_layers, the number of experts or the rows_per_head of the tables"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


def least_step_bytes(plan: Plan) -> int:
    """Bytes that a training step takes at the very least: its token ids, and the streams that each block starts from.

    What blocks keep inside comes on top, so that a step which fits into this may still run out of memory.
    """
    model, train = plan.config.model, plan.config.train
    streams = model.num_layers * model.hc_mult * model.hidden_size * getattr(torch, train.dtype).itemsize
    # Tokens, targets and document ids.
    return 3 * torch.int64.itemsize * plan.tokens + plan.tokens // plan.micro_batches * streams


def _smaller_step(config: Config) -> str:
    at_once = config.train.micro_batch_size or config.train.batch_size
    return f"train.micro_batch_size (now {at_once} of train.batch_size {config.train.batch_size}) or train.batch_size"


@contextlib.contextmanager
def explain_out_of_memory(message: str) -> Iterator[None]:
    """Raise UserError with `message` where what happens inside runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _COMPLAINTS):
            raise
        raise UserError(message) from error


def step_too_large(config: Config, device: torch.device) -> str:
    """What to say where a training step runs out of memory."""
    train, length = config.train, config.data.sequence_length
    at_once = train.micro_batch_size or train.batch_size
    # What this very run may change, and go on with ...
    here = [f"lower train.micro_batch_size (now {at_once} of train.batch_size {train.batch_size})"] * (at_once > 1)
    here += ["set train.activation_checkpointing=true"] * (not train.activation_checkpointing)
    # ... and what makes another one of it.
    elsewhere = ["train.batch_size"] * (at_once > 1) + ["data.sequence_length", "the size of the model"]
    advice = f"lower {' or '.join(elsewhere)} in another run_dir"
    if here:
        advice = f"{' or '.join(here)}, and the same command goes on from the last checkpoint; else {advice}"
    return f"the {device.type} ran out of memory in a training step over {at_once} x {length:,} tokens: {advice}"


def evaluation_too_large(config: Config, device: torch.device) -> str:
    """What to say where an evaluation runs out of memory."""
    return (
        f"the {device.type} ran out of memory in an evaluation over {config.eval.batch_size} x "
        f"{config.data.sequence_length:,} tokens: lower eval.batch_size, and the same command goes on from the last "
        "checkpoint"
    )
