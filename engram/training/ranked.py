"""A run on several ranks, from the first look at one another to the exit status."""

import hashlib
import json
import sys

from engram.config import Config
from engram.distributed.world import World, join_world
from engram.model.device import choose_device
from engram.training.provenance import provenance
from engram.training.shared_folder import SharedFolder
from engram.training.trainer import Trainer


def train_on_ranks(config: Config) -> int:
    """Train as one of the ranks that a launcher started; returns the exit status. Raises UserError."""
    assert config.distributed is not None
    device = choose_device(config.train.device, "train.device")
    with join_world(device, config.distributed.timeout_seconds) as world:
        _agree(config, world)
        with SharedFolder(config, world) as folder:
            if (note := folder.finished_note) is not None:
                if world.is_first:
                    print(note, file=sys.stderr)
                return 0
            return Trainer(config, folder, world).fit()


def _agree(config: Config, world: World) -> None:
    """Raises RankError where ranks have other settings, code or versions than the first."""
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    world.agree("the config", hashlib.sha256(settings.encode()).hexdigest()[:12], "give all ranks the same command")
    code = provenance()
    advice = "install the same code and packages on all machines"
    world.agree("the code", f"commit {code['commit']}, changes {code['uncommitted_sha256']}", advice)
    for package in ("python", "torch", "numpy"):
        world.agree(package, code[package], advice)
