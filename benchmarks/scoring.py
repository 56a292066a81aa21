"""Scoring of answers: ours against lm-eval's own Hugging Face backend on the same requests and weights.

    python -m benchmarks.scoring [--repeats 5] [--docs 128]

The model is configs/study.yaml without memory and hyper-connections, which `transformers` computes as DeepSeek-V3; both
hold the same float32 weights, and every score is compared before anything is timed. The peer runs with each of several
batch sizes: the fastest counts. Its experts are `grouped_mm`; the other fast form, `batched_mm`, copies the weights of
every token's experts, which at these batches takes gigabytes. Needs the extra `bench`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from engram.config import ModelConfig, load_config
from engram.model.transformer import Transformer
from eval.scoring import Request, score
from tests.reference.deepseek_v3 import public_model

# At least this many times as fast as the fastest peer.
TARGET = 3.0
BATCH_SIZES = (8, 32)
# Sums over a few tokens, float32 on both sides.
TOLERANCE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=FEWEST_REPEATS, metavar="N")
    parser.add_argument("--docs", type=at_least(1), default=128, metavar="N", help="questions of each workload")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options.repeats, options.docs)
    show(rows)
    if options.repeats < FEWEST_REPEATS:
        print(f"fewer than {FEWEST_REPEATS} repeats are a trial: nothing is saved")
    else:
        print(f"saved to {save_results(rows, describe_machine('cpu'), 'scoring')}")


def workloads(docs: int, vocab_size: int) -> dict[str, list[Request]]:
    """Four answers to each question: as texts, as letters, and as texts behind a few-shot prompt."""
    torch.manual_seed(0)

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocab_size, (length,)).tolist())

    shots = drawn(400)
    questions = [drawn(40 + 17 * doc % 120) for doc in range(docs)]
    texts = [[drawn(3 + (doc + choice) % 9) for choice in range(4)] for doc in range(docs)]
    letters = [(choice + 1,) for choice in range(4)]
    pairs = list(zip(questions, texts, strict=True))
    return {
        "texts, 0 shots": [Request(question, text) for question, own in pairs for text in own],
        "letters, 5 shots": [Request(shots + question, letter) for question in questions for letter in letters],
        "texts, 5 shots": [Request(shots + question, text) for question, own in pairs for text in own],
    }


def measure(repeats: int, docs: int) -> list[dict[str, Any]]:
    config = load_config("configs/study.yaml").model
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**config.model_dump(), "memory": None, "hyper_connection": None})).eval()
    peers = {f"lm-eval, batch {size}": peer(model, size) for size in BATCH_SIZES}
    rows = []
    for name, requests in workloads(docs, config.vocab_size).items():
        contenders: dict[str, Callable[[], list[float]]] = {
            "ours": lambda asked=requests: [one.logprob for one in score(model, asked)],  # type: ignore[misc]
            **{peer_name: ask(lm, requests) for peer_name, lm in peers.items()},
        }
        # The first round is compared and not counted.
        expected = contenders["ours"]()
        for contender, work in contenders.items():
            worst = max(abs(a - b) for a, b in zip(work(), expected, strict=True))
            assert worst < TOLERANCE, f"{contender} differs from ours by {worst:.2g} nats on {name}"
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(repeats):
            for contender, work in contenders.items():
                start = time.perf_counter()
                work()
                seconds[contender].append(time.perf_counter() - start)
        own = statistics.median(seconds["ours"])
        rows += [
            {
                "workload": name,
                "contender": contender,
                "requests": len(requests),
                "median_s": statistics.median(times),
                "fastest_s": min(times),
                "slowest_s": max(times),
                "ours_is_faster": statistics.median(times) / own,
                "repeats": repeats,
            }
            for contender, times in seconds.items()
        ]
    return rows


def peer(model: Transformer, batch_size: int) -> HFLM:
    public = public_model(model)
    public.set_experts_implementation("grouped_mm")
    words = Tokenizer(WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    return HFLM(pretrained=public, tokenizer=tokenizer, batch_size=batch_size, max_length=4096, device="cpu")


def ask(lm: HFLM, requests: list[Request]) -> Callable[[], list[float]]:
    asked = [((str(one.context), str(one.continuation)), list(one.context), list(one.continuation)) for one in requests]
    return lambda: [logprob for logprob, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("workload", "contender", "median", "ours is faster by", box=None, header_style="bold")
    for row in rows:
        note = "" if row["contender"] == "ours" else f"{row['ours_is_faster']:.2f} x"
        table.add_row(row["workload"], row["contender"], f"{row['median_s']:.2f} s", note)
    console = Console()
    console.print(table)
    for workload in dict.fromkeys(row["workload"] for row in rows):
        peers = [row for row in rows if row["workload"] == workload and row["contender"] != "ours"]
        least = min(row["ours_is_faster"] for row in peers)
        console.print(f"{workload}: {least:.2f} x the fastest peer (target {TARGET:g} x)")


if __name__ == "__main__":
    main()
