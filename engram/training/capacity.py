"""Whether a run fits into memory: asked before it starts, explained where it turns out not to."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engram.config import Config, UserError
from engram.distributed.accounting import held_at_start, held_by
from engram.distributed.plan import Plan

# CPUs that are out of memory raise a plain RuntimeError, and so do some of CUDA's libraries.
_COMPLAINTS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")

# Files of a control group, version 2 and version 1: limit, use, and the part of the use that files occupy which the
# kernel gives up when memory is short.
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


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
        raise UserError(f"{message}, but only {_gib(free)} are free on {device.type}: {SMALLER}")
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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [free for free in (_machine_memory(), container_memory()) if free is not None]
    return min(known, default=None)


def container_memory(root: Path = Path("/")) -> int | None:
    """Bytes left below the tightest limit of this process's control groups; None where there is no limit.

    Containers and batch systems kill a process that exceeds it, however much memory the machine has. `root`: where
    /proc and /sys are found.
    """
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mounted / path.lstrip("/")
        # A group is bound by the limits of all groups above it. Inside a container the path may be one outside of it,
        # which does not exist; then the container's own group is what is mounted.
        groups = [folder for folder in (group, *group.parents) if folder.is_relative_to(mounted)]
        left += [free for folder in groups if (free := _left_in(folder, version_1=bool(controllers))) is not None]
    return min(left, default=None)


def _left_in(group: Path, version_1: bool) -> int | None:
    limit_name, use_name, file_names = _VERSION_1 if version_1 else _VERSION_2
    limit, use = _read(group / limit_name).strip(), _read(group / use_name).strip()
    # Version 2 writes "max" for no limit, version 1 a number beyond any memory.
    if not limit.isdecimal() or not use.isdecimal():
        return None
    statistics = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    reclaimable = sum(int(statistics.get(name, 0)) for name in file_names)
    return max(0, int(limit) - int(use) + reclaimable)


def _machine_memory() -> int | None:
    lines = _read(Path("/proc/meminfo")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _read(path: Path) -> str:
    """The file's text; nothing where it is not there or not ours to read."""
    try:
        return path.read_text()
    except OSError:
        return ""
