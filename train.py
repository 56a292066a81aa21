"""Train a model: python train.py CONFIG [a.b=c ...]"""

import argparse
import signal
import sys

from engram.distributed.dry_run import add_options, dry_run, unasked

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
torchrun ends with 1 where any rank's status is not 0, below the lines that a rank wrote.
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG)
    parser.description = "Train the model that CONFIG describes, in the folder run_dir."
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
    if option := unasked(options):
        parser.error(f"{option} belongs to a plan that is not started: give --dry-run too")
    if options.dry_run:
        return dry_run(options)
    # SIGTERM stops as Ctrl-C does, from the imports on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from engram.training.launch import train

        return train(options.config, options.overrides)
    except KeyboardInterrupt:
        print("interrupted at once: nothing was saved since the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    from engram.training.launch import leave

    leave(status)
