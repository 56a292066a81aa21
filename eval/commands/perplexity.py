"""`python -m eval perplexity`: loss, perplexity and bits per byte on prepared data."""

import argparse
import sys

from eval.commands.options import add_checkpoint, add_dtype, add_tables, count, show

HELP = "loss, perplexity and bits per byte on prepared data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the model was trained on")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="(default validation)")
    parser.add_argument("--tokens", type=count, metavar="N", help="score the first N tokens; default: all")
    parser.add_argument("--sequence-length", type=count, metavar="N", help="default: as in training")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_dtype(parser)
    add_tables(parser)


def run(options: argparse.Namespace) -> None:
    from eval import perplexity
    from eval.loading import beyond_training, check_rows, load, open_split

    loaded = load(options.checkpoint, options.device, options.dtype, options.threads, options.tables)
    length, batch_size = options.sequence_length or loaded.config.data.sequence_length, loaded.config.eval.batch_size
    dataset = open_split(options.data or loaded.config.data.path, loaded.tokenizer, options.split)
    check_rows(dataset, length, options.tokens)
    if warning := beyond_training(loaded, length):
        print(f"warning: {warning}", file=sys.stderr)
    result = perplexity.measure_split(loaded.model, loaded.tokenizer, dataset, length, batch_size, options.tokens)
    facts = {
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
        "data": str(dataset.folder),
        "split": options.split,
        "dtype": options.dtype,
        "targets": result.targets,
        "bytes": result.bytes,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }
    show(facts, options.json)
