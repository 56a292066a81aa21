"""A run on several ranks, from the first look at one another to the exit status."""

import hashlib
import json
import re
import sys

from torch.distributed import DistError

from engram.config import Config
from engram.distributed.world import World, join_world
from engram.model.device import choose_device
from engram.training.provenance import provenance
from engram.training.shared_folder import SharedFolder
from engram.training.trainer import Trainer

RANK_LOST = 1
# Their errors are plain RuntimeErrors that bear their names.
_TRANSPORTS = ("gloo", "NCCL")


def train_on_ranks(config: Config) -> int:
    """Train as one of the ranks that a launcher started; returns the exit status. Raises UserError."""
    assert config.distributed is not None
    device = choose_device(config.train.device, "train.device")
    with join_world(device, config.distributed.timeout_seconds) as world:
        return train_in_world(world, config)


def train_in_world(world: World, config: Config) -> int:
    """`train_on_ranks`, once the ranks have met."""
    try:
        agree(world, config)
        with SharedFolder(config, world) as folder:
            if (note := folder.finished_note) is None:
                return Trainer(config, folder, world).fit()
            if world.is_first:
                print(note, file=sys.stderr)
            return 0
    except RuntimeError as error:
        if not isinstance(error, DistError) and not any(word in str(error) for word in _TRANSPORTS):
            raise
        print(f"error: {lost_rank(str(error), world, config)}", file=sys.stderr)
        return RANK_LOST


def lost_rank(reason: str, world: World, config: Config) -> str:
    """What to say where a message to or from another rank failed: transports know addresses, not ranks."""
    assert config.distributed is not None
    what = "the connection to another rank broke, which is gone: its own output tells why"
    if "timed out" in reason.lower():
        what = (
            f"another rank has not answered for {config.distributed.timeout_seconds} s: if it was only slow, raise "
            "distributed.timeout_seconds; else its own output tells why"
        )
    return (
        f"rank {world.rank} of {world.size}: {what}; the same command goes on from the newest checkpoint, with fewer "
        f"ranks too ({_brief(reason)})"
    )


def _brief(reason: str) -> str:
    """A transport's first line, without the place in its sources and what it guesses."""
    line = reason.strip().splitlines()[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", line).partition(". ")[0]


def agree(world: World, config: Config) -> None:
    """Raises RankError where ranks have other settings, code or versions than the first."""
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    world.agree("the config", hashlib.sha256(settings.encode()).hexdigest()[:12], "give all ranks the same command")
    code = provenance()
    advice = "install the same code and packages on all machines"
    world.agree("the code", f"commit {code['commit']}, changes {code['uncommitted_sha256']}", advice)
    for package in ("python", "torch", "numpy"):
        world.agree(package, code[package], advice)
