"""`python -m eval ngram`: losses of unigram, bigram and trigram models on prepared data."""

import argparse
from pathlib import Path

from eval.commands.options import count, show

HELP = "losses of unigram, bigram and trigram models on prepared data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="prepared data")
    parser.add_argument("--tokens", type=count, metavar="N", help="score the first N validation tokens; default: all")
    parser.add_argument(
        "--sequence-length",
        type=count,
        default=1024,
        metavar="N",
        help="row length, where contexts end (default 1024)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    from engram.data.shards import Dataset
    from eval import ngram
    from eval.loading import check_rows

    check_rows(Dataset(options.data, "validation"), options.sequence_length, options.tokens)
    result = ngram.measure(options.data, options.sequence_length, options.tokens)
    facts = {name: getattr(result, name) for name in ("unigram", "bigram", "trigram", "targets", "train_tokens")}
    show({"data": str(options.data), **facts}, options.json)
