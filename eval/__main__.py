"""`python -m eval TASK ...`: reports, losses, samples and gates of trained models.

Exit status: 0 done, 2 wrong input (one message), 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# torch is imported by the task that needs it: --help answers at once.
from engram.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.task(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has closed it, like `head`; the flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    from eval.report import print_summary, write_report

    path, runs = write_report(options.run_dirs, options.out, data=options.data, device=options.device)
    print_summary(runs, path, Console())


def _perplexity(options: argparse.Namespace) -> None:
    from eval import perplexity
    from eval.loading import check_rows, load, open_split

    loaded = load(options.checkpoint, options.device, options.dtype, options.threads)
    length, batch_size = options.sequence_length or loaded.config.data.sequence_length, loaded.config.eval.batch_size
    dataset = open_split(options.data or loaded.config.data.path, loaded.tokenizer, options.split)
    check_rows(dataset, length, options.tokens)
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
    _print(facts, options.json)


def _generate(options: argparse.Namespace) -> None:
    from engram.inference.generate import generate
    from eval.loading import load

    loaded = load(options.checkpoint, options.device, options.dtype, options.threads)
    prompt = loaded.encode(options.prompt)
    rows = generate(
        loaded.model,
        [prompt] * options.samples,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eos_id=loaded.tokenizer.eos_id,
    )
    for index, row in enumerate(rows.tolist()):
        if index:
            print("\n---")
        print(options.prompt + loaded.continuation(prompt, row))


def _gates(options: argparse.Namespace) -> None:
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


def _ngram(options: argparse.Namespace) -> None:
    from engram.data.shards import Dataset
    from eval import ngram
    from eval.loading import check_rows

    check_rows(Dataset(options.data, "validation"), options.sequence_length, options.tokens)
    result = ngram.measure(options.data, options.sequence_length, options.tokens)
    facts = {name: getattr(result, name) for name in ("unigram", "bigram", "trigram", "targets", "train_tokens")}
    _print({"data": str(options.data), **facts}, options.json)


def _print(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        text = f"{value:.6f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{name.replace('_', ' '):16}{text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Look at what training made.")
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)

    report = tasks.add_parser("report", help="one HTML page about a run, or about several side by side")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a training run")
    report.add_argument("--out", metavar="FILE.html", help="default: RUN_DIR/report.html; of several: comparison.html")
    report.add_argument("--data", metavar="DIR", help="prepared data, if it is no longer where the config says")
    _add_device(report)
    report.set_defaults(task=_report)

    perplexity = tasks.add_parser("perplexity", help="loss, perplexity and bits per byte on prepared data")
    _add_checkpoint(perplexity)
    perplexity.add_argument("--data", metavar="DIR", help="prepared data; default: what the model was trained on")
    perplexity.add_argument("--split", choices=("validation", "train"), default="validation")
    perplexity.add_argument("--tokens", type=_count, metavar="N", help="score the first N tokens; default: all")
    perplexity.add_argument("--sequence-length", type=_count, metavar="N", help="default: as in training")
    perplexity.add_argument("--json", action="store_true", help="print one JSON object")
    _add_dtype(perplexity)
    perplexity.set_defaults(task=_perplexity)

    generate = tasks.add_parser("generate", help="continue a prompt")
    _add_checkpoint(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--tokens", type=_count, default=128, metavar="N", help="tokens to add at most (default 128)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    generate.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that sum to P")
    generate.add_argument("--seed", type=_seed, default=0, metavar="N", help="0 to 2**32 - 1 (default 0)")
    generate.add_argument("--samples", type=_count, default=1, metavar="N", help="continuations to print (default 1)")
    _add_dtype(generate)
    generate.set_defaults(task=_generate)

    gates = tasks.add_parser("gates", help="heat map of the memory's gates over a text, as HTML and CSV")
    _add_checkpoint(gates)
    gates.add_argument("--text", required=True, metavar="TEXT")
    gates.add_argument("--out", required=True, type=Path, metavar="FILE.html")
    gates.set_defaults(task=_gates)

    ngram = tasks.add_parser("ngram", help="losses of unigram, bigram and trigram models on prepared data")
    ngram.add_argument("--data", required=True, type=Path, metavar="DIR", help="prepared data")
    ngram.add_argument("--tokens", type=_count, metavar="N", help="score the first N validation tokens; default: all")
    ngram.add_argument(
        "--sequence-length",
        type=_count,
        default=1024,
        metavar="N",
        help="row length, where contexts end (default 1024)",
    )
    ngram.add_argument("--json", action="store_true", help="print one JSON object")
    ngram.set_defaults(task=_ngram)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder: its latest")
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads; default: as many as in training")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return count


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
