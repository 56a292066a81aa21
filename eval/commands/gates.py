"""`python -m eval gates`: the memory's gates over a text, or over documents with a score for every layer and stream."""

import argparse
import sys
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_checkpoint, count
from eval.output import check_out

HELP = "the memory's gates: heat maps of a text or of documents, the long table, a score for each layer and stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="TEXT", help="heat map of this text; --out is FILE.html")
    source.add_argument(
        "--documents", type=count, metavar="N", help="the first N documents of a split; --out is a folder"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE.html|DIR", help="the page of a text; of documents, a folder"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data; default: what the model was trained on")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="(default validation)")
    parser.add_argument("--length", type=count, default=256, metavar="N", help="tokens of a document (default 256)")
    parser.add_argument("--show", type=count, default=6, metavar="N", help="documents on the page (default 6)")


def run(options: argparse.Namespace) -> None:
    if options.text is not None:
        _text(options)
    else:
        _documents(options)


def _text(options: argparse.Namespace) -> None:
    from engram.report.figure import to_csv
    from engram.report.page import Page
    from eval.gates import text as gates
    from eval.loading import beyond_training, check_target, load

    check_target(options.out)
    loaded = load(options.checkpoint, options.device, "float32", options.threads)
    ids = loaded.encode(options.text)
    found = gates.measure(loaded.model, ids, gates.token_texts(loaded.tokenizer, ids))
    page = Page("Memory gates", f"{loaded.folder}")
    page.text(gates.CAPTION)
    if warning := beyond_training(loaded, len(ids)):
        print(f"warning: {warning}", file=sys.stderr)
        page.note(warning)
    page.html(found.html())
    table = options.out.with_suffix(".csv")
    try:
        page.write(options.out)
        table.write_text(to_csv(found.columns()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written: {error}: name another file with --out") from None
    print(f"{options.out}\n{table}")


def _documents(options: argparse.Namespace) -> None:
    from eval.gates.study import study
    from eval.loading import load, open_split

    if options.out.suffix.lower() in (".html", ".htm") or options.out.is_file():
        raise UserError(f"{options.out}: --documents writes a folder of tables and figures: name a folder with --out")
    check_out(options.out)
    loaded = load(options.checkpoint, options.device, "float32", options.threads)
    dataset = open_split(options.data or loaded.config.data.path, loaded.tokenizer, options.split)
    print("\n".join(study(loaded, dataset, options.out, options.documents, options.length, options.show)))
