"""`python -m eval generate`: continue a prompt."""

import argparse

from eval.commands.options import add_checkpoint, add_dtype, add_tables, count, seed

HELP = "continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on from")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="tokens to add at most (default 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="0 to 2**32 - 1 (default 0)")
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="continuations to print (default 1)")
    add_dtype(parser)
    add_tables(parser)


def run(options: argparse.Namespace) -> None:
    from engram.inference.generate import generate
    from eval.loading import load

    loaded = load(options.checkpoint, options.device, options.dtype, options.threads, options.tables)
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
