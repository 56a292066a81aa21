"""Command line of the data room: prepare a folder of shards, list the known corpora, look into a prepared folder."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engram.config import UserError, load_config
from engram.data.corpora import known_corpora
from engram.data.prepare import prepare
from engram.data.recipe import LARGE
from engram.data.shards import verify_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input (one message), 130 interrupted (nothing half-written is left)."""
    options = _parse(arguments)
    errors = Console(stderr=True)
    # A polite kill cleans up like an interrupt does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.command == "prepare":
            prepare(load_config(options.config, options.overrides), force=options.force, console=errors)
        elif options.command == "list":
            _list(Console())
        else:
            _inspect(options.folder, Console())
        sys.stdout.flush()
    except UserError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted: nothing half-written is left", style="red")
        return 130
    except BrokenPipeError:
        # Who read our output has closed it, like `head`; the flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides behind an option are left over by argparse, which takes all positional arguments at the first of them.
    if rest and (options.command != "prepare" or any(part.startswith("-") for part in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engram.data",
        description="From text to token shards: prepare a folder, list the known corpora, inspect a prepared folder.",
        epilog="Exit status: 0 done, 2 wrong input (one message), 130 interrupted (nothing half-written is left).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "prepare",
        help="build the folder data.path that a config asks for",
        description="Read data.sources, drop duplicates, split by document, train or load the tokenizer, and write "
        "token shards and a manifest to data.path. A folder that matches the config is left as it is.",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml")
    command.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings over those of the file")
    command.add_argument("--force", action="store_true", help="replace a prepared folder, whatever its settings")
    commands.add_parser("list", help="show the corpora known by name: size, licence, what they need")
    command = commands.add_parser("inspect", help="show a prepared folder's manifest, and verify every checksum and id")
    command.add_argument("folder", metavar="FOLDER", help="a prepared folder (data.path)")
    return parser


def _list(console: Console) -> None:
    corpora = known_corpora()
    table = Table("name", "MB", "licence", "needs", title="Corpora known by name (data.sources)")
    for corpus in corpora.values():
        table.add_row(f"{corpus.name}", f"{corpus.megabytes:g}", corpus.licence, corpus.needs)
    megabytes = sum(corpora[name].megabytes for name in LARGE)
    table.add_row("large", f"{megabytes:.0f}", "see each", "see each")
    console.print(table)
    for corpus in corpora.values():
        console.print(f"{corpus.name}: {corpus.description}", highlight=False, soft_wrap=True)
    console.print(f"large: all of {', '.join(LARGE)}", highlight=False, soft_wrap=True)


def _inspect(folder: str, console: Console) -> None:
    manifest = verify_folder(folder)
    table = Table("source", title=folder)
    for heading in ("documents", "bytes", "characters", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in manifest.sources:
        counts = (source.documents, source.bytes, source.characters, source.tokens)
        table.add_row(source.name, *(f"{count:,}" for count in counts))
    console.print(table)
    tokenizer = manifest.tokenizer
    lines = [f"{source.name}: {source.origin}; licence: {source.licence}" for source in manifest.sources]
    lines += [
        f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, shards: {len(split.shards)}, "
        f"digest {split.digest[:16]}"
        for name, split in manifest.splits.items()
    ]
    lines += [
        f"tokenizer: {tokenizer.file}, {tokenizer.vocab_size:,} ids, {manifest.dtype}, digest {tokenizer.digest[:16]}",
        f"split: seed {manifest.split_seed}, validation fraction {manifest.validation_fraction:g}",
        "verified: all checksums and token ids are right",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
