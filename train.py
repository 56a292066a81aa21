"""Train a model: python train.py CONFIG [a.b=c ...]"""

import argparse
import os
import signal
import sys
from typing import NoReturn

from engram.distributed.dry_run import add_options, dry_run

EPILOG = """\
examples:
  python train.py configs/quickstart.yaml
  python train.py configs/quickstart.yaml train.steps=50 optim.lr=0.002 run_dir=runs/short
  python train.py configs/quickstart.yaml model.memory=null run_dir=runs/without_memory
  torchrun --nproc-per-node 8 train.py configs/quickstart.yaml distributed.zero_stage=2
  python train.py configs/cluster/engram_27b.yaml --dry-run --ranks 64

A second call on the same run_dir goes on from its latest checkpoint; Ctrl-C saves one first.

exit status:
  0    done, or stopped at train.stop_after
  1    another rank is gone
  2    the config or an input cannot be used (the message says which, and what to change)
  3    diverged: non-finite loss or gradients; run_dir/postmortem_... holds the step
  130  interrupted by SIGINT or SIGTERM, after saving
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    description = "Train the model that CONFIG describes, in the folder run_dir."
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=EPILOG, formatter_class=layout)
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file; engram/config.py and config_model.py hold every setting"
    )
    parser.add_argument(
        "overrides", metavar="a.b=c", nargs="*", default=[], help="settings that replace those of CONFIG"
    )
    # What `deepspeed` tells besides the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_options(parser)
    # Overrides may stand behind options.
    options = parser.parse_intermixed_args(arguments)
    if options.dry_run:
        return dry_run(options)
    # SIGTERM stops as Ctrl-C does, from the imports on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return train(options.config, options.overrides)
    except KeyboardInterrupt:
        print("interrupted at once: nothing was saved since the last checkpoint", file=sys.stderr)
        return 130


def train(path: str, overrides: list[str]) -> int:
    """Imports as late as can be: what is wrong with config or run folder is said before torch has been loaded."""
    from engram.config import UserError, load_config
    from engram.training.run_folder import RunFolder

    try:
        config = load_config(path, overrides)
        if config.distributed is None and (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(f"{ranks} ranks were started, but distributed is null: give distributed={{}}, or start one")
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
        print(f"error: {error}", file=sys.stderr)
        return 2


def leave(status: int) -> NoReturn:
    """Exit with `status`; everything has been saved and closed."""
    if "deepspeed" in sys.modules:
        # It keeps gloo's threads alive, and one that still has a tensor to drop aborts an interpreter that is being
        # taken down: rarely, but then a finished run ends with status -6.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
