"""`python -m eval gates`: heat map of the memory's gates over a text, as HTML and CSV."""

import argparse
from pathlib import Path

from engram.config import UserError
from eval.commands.options import add_checkpoint

HELP = "heat map of the memory's gates over a text, as HTML and CSV"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--text", required=True, metavar="TEXT")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html")


def run(options: argparse.Namespace) -> None:
    from engram.report.figure import to_csv
    from engram.report.page import Page
    from eval import gates
    from eval.loading import check_target, load

    check_target(options.out)
    loaded = load(options.checkpoint, options.device, "float32", options.threads)
    ids = loaded.encode(options.text)
    found = gates.measure(loaded.model, ids, gates.token_texts(loaded.tokenizer, ids))
    page = Page("Memory gates", f"{loaded.folder}")
    page.text(gates.CAPTION)
    page.html(found.html())
    table = options.out.with_suffix(".csv")
    try:
        page.write(options.out)
        table.write_text(to_csv(found.columns()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written: {error}: name another file with --out") from None
    print(f"{options.out}\n{table}")
