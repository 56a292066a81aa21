"""From the words of a command line to an exit status: what `train.py` does.

Imports as late as can be: what is wrong with config or run folder is said before torch has been loaded.
"""

import os
import sys
from typing import NoReturn

from engram.config import UserError, load_config
from engram.distributed.plan import check_launch
from engram.training.run_folder import RunFolder

REFUSED = 2


def train(path: str, overrides: list[str]) -> int:
    """Train the config at `path` with `overrides`; returns the exit status, of which `train.py --help` tells."""
    try:
        config = load_config(path, overrides)
        check_launch(config, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        return refuse(error, seen_by_all=True)
    try:
        if config.distributed is not None:
            from engram.training.ranked import train_on_ranks

            return train_on_ranks(config)
        with RunFolder(config) as folder:
            if (note := folder.finished_note) is not None:
                print(note, file=sys.stderr)
                return 0
            from engram.training.trainer import Trainer

            return Trainer(config, folder).fit()
    except UserError as error:
        return refuse(error, seen_by_all=error.of_another_rank)


def refuse(error: UserError, seen_by_all: bool) -> int:
    """Print the message, which one rank of each machine does where all ranks have it; returns the exit status."""
    if not seen_by_all or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return REFUSED


def leave(status: int) -> NoReturn:
    """Exit with `status`; everything has been saved and closed."""
    if "deepspeed" in sys.modules:
        # It keeps gloo's threads alive, and one that still has a tensor to drop aborts an interpreter that is being
        # taken down: rarely, but then a finished run ends with status -6.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
