"""`python -m eval add-data`: put a benchmark's data into data/benchmarks, with a manifest of checksums."""

import argparse
from pathlib import Path

from engram.config import UserError

HELP = "put a benchmark's data into data/benchmarks, from a package or from files that you have"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a benchmark, as verify-data lists it")
    parser.add_argument(
        "--file",
        type=_placed,
        action="append",
        default=[],
        metavar="SPLIT[/SUBSET]=FILE",
        help="an original file of the benchmark, or JSON lines; may be given several times. Without it, the data "
        "comes from the package that ships it",
    )
    parser.add_argument("--licence", metavar="TEXT", help="of the files, as the manifest keeps it")
    parser.add_argument("--source", metavar="TEXT", help="where the files came from")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of benchmarks (default data/benchmarks)")


def run(options: argparse.Namespace) -> None:
    from eval.benchmarks.add import add_files, add_package
    from eval.benchmarks.catalogue import FOLDER

    folder = options.data or FOLDER
    if not options.file:
        manifest = add_package(folder, options.name)
    elif not options.licence or not options.source:
        raise UserError(
            "--file needs --licence and --source: the manifest says what the data is and where it came from"
        )
    else:
        manifest = add_files(folder, options.name, options.file, options.licence, options.source)
    print(f"{folder / options.name}: {len(manifest.files)} files, {manifest.licence}, from {manifest.source}")
    if manifest.note:
        print(manifest.note)


def _placed(text: str) -> tuple[str, Path]:
    place, equals, path = text.partition("=")
    if not place or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=FILE, such as test=questions.jsonl")
    return place, Path(path)
