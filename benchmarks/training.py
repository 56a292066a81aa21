"""Training speed, side by side in one process and interleaved: ours, `transformers`, hyper-connections, Engram.

    python -m benchmarks.training [--steps 12] [--threads 2] [--without-peers]

Every contender sees the same fresh batches. Peers and our plain model update with torch's fused AdamW on float32
masters; ours with hyper-connections and with Engram train as configs/tiny_moe.yaml and configs/tiny_engram.yaml do.
Medians and ratios are what to read: absolute times follow the machine's mood.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.contest import implementations_of
from benchmarks.kernel_report import short_implementation
from benchmarks.machine import FEWEST_REPEATS, at_least, describe_machine, save_results
from benchmarks.peers import EXPERT_IMPLEMENTATIONS, MasterAdamW, deepseek_v3, peer_loss
from engram.config import Config, ModelConfig, load_config
from engram.model.transformer import Transformer
from engram.optim.clip import clip_grad_norm
from engram.optim.optimizer import build_optimizer
from engram.training.setup import configure_process

Step = Callable[[Tensor, Tensor], None]


def plain_step(model: ModelConfig, device: str) -> Step:
    """Our model with the peers' optimizer."""
    ours = _ours(model, device)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        ours.loss(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update_router_bias()

    return step


def recipe_step(config: Config, model: ModelConfig, device: str) -> Step:
    """Our model with the optimizers of its config: Muon, AdamW, row Adam, clipping."""
    ours = _ours(model, device)
    optimizer = build_optimizer(ours.named_parameters(), config.optim)

    def step(tokens: Tensor, targets: Tensor) -> None:
        ours.loss(tokens, targets).backward()
        clip_grad_norm(ours.parameters(), config.optim.clip_norm)
        optimizer.step(1e-3)
        optimizer.zero_grad()
        ours.update_router_bias()

    return step


def peer_step(model: ModelConfig, experts: str, compiled: bool, device: str) -> Step:
    peer = deepseek_v3(model, experts).to(device)
    optimizer = MasterAdamW(list(peer.parameters()), lr=1e-3)
    forward = torch.compile(peer) if compiled else peer

    def step(tokens: Tensor, targets: Tensor) -> None:
        peer_loss(forward, tokens, targets).backward()
        optimizer.step()

    return step


def _ours(model: ModelConfig, device: str) -> Transformer:
    ours = Transformer(model).to(device).train()
    ours.compute_dtype = torch.bfloat16
    ours.compile_blocks()
    return ours


def measure(
    contenders: dict[str, Step], config: Config, steps: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each contender's steps. All take their n-th step before any takes the next one."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.batch_size, config.data.sequence_length)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for index in track(range(warmup + steps), description="steps", transient=True):
        # Zipf-like ids: as in text, some rows and experts are far busier than others.
        uniform = torch.rand(2, *shape, generator=generator)
        tokens, targets = (config.model.vocab_size**uniform).long().clamp_(max=config.model.vocab_size - 1).to(device)
        for name, step in contenders.items():
            if name in failed:
                continue
            start = time.perf_counter()
            try:
                step(tokens, targets)
            except Exception as error:
                # A peer that cannot compile or run here is reported as such, not left out in silence.
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    for name, reason in failed.items():
        seconds.pop(name)
        Console().print(f"[yellow]{name}: did not run: {reason}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(1), default=12, help="counted steps of each contender (default: 12)")
    parser.add_argument(
        "--warmup", type=at_least(0), default=3, help="uncounted first steps, which compile (default: 3)"
    )
    parser.add_argument("--threads", type=at_least(1), default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--without-peers", action="store_true", help="only our own models")
    arguments = parser.parse_args()

    moe, engram = load_config("configs/tiny_moe.yaml"), load_config("configs/tiny_engram.yaml")
    configure_process(moe.train.model_copy(update={"threads": arguments.threads}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = moe.model.replace(hyper_connection=None)
    contenders = {"ours, plain residual": plain_step(plain, device)}
    if not arguments.without_peers:
        for experts in EXPERT_IMPLEMENTATIONS:
            for compiled in (False, True):
                name = f"transformers, {experts}, {'compiled' if compiled else 'eager'}"
                contenders[name] = peer_step(plain, experts, compiled, device)
    contenders["ours, mHC"] = recipe_step(moe, moe.model, device)
    contenders["ours, mHC + Engram"] = recipe_step(engram, engram.model, device)

    seconds = measure(contenders, moe, arguments.steps, arguments.warmup, device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    # After what is measured: it is a step of its own.
    tokens = torch.zeros(moe.train.batch_size, moe.data.sequence_length, dtype=torch.int64, device=device)
    ours = [name for name in seconds if name.startswith("ours")]
    implementations = {name: implementations_of(functools.partial(contenders[name], tokens, tokens)) for name in ours}
    report(seconds, medians, implementations, moe.tokens_per_step, describe_machine(device))


def report(
    seconds: dict[str, list[float]],
    medians: dict[str, float],
    implementations: dict[str, dict[str, str]],
    tokens: int,
    machine: dict[str, object],
) -> None:
    peers = [name for name in medians if name.startswith("transformers")]
    best_peer = min(peers, key=medians.__getitem__) if peers else None
    rows, table = [], Table(title=f"training, {machine['machine']}, {machine['threads']} threads")
    for column in ("contender", "kernels"):
        table.add_column(column)
    for column in ("ms per step (min to max)", "tokens/s", "speed against the best peer"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        ratio = medians[best_peer] / medians[name] if best_peer else None
        rows.append(
            {
                "contender": name,
                "median_ms": round(1e3 * medians[name], 2),
                "min_ms": round(1e3 * min(times), 2),
                "max_ms": round(1e3 * max(times), 2),
                "tokens_per_second": round(tokens / medians[name]),
                "speed_against_best_peer": ratio and round(ratio, 3),
                "steps": len(times),
                # Peers have none.
                **({"implementations": implementations[name]} if name in implementations else {}),
            }
        )
        span = f"{1e3 * medians[name]:.0f} ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})"
        speed = f"{tokens / medians[name]:,.0f}", f"{ratio:.2f}" if ratio else "-"
        table.add_row(name, short_implementation(implementations.get(name, {})), span, *speed)
    console = Console()
    console.print(table)
    pairs = zip(seconds["ours, mHC + Engram"], seconds["ours, mHC"], strict=True)
    overhead = statistics.median(engram / baseline for engram, baseline in pairs) - 1
    console.print(f"Engram on / off: {overhead:+.1%} step time (median of paired steps)")
    rows.append({"contender": "Engram on / off", "step_time_change": round(overhead, 4)})
    if any(len(times) < FEWEST_REPEATS for times in seconds.values()):
        console.print(f"a trial of fewer than {FEWEST_REPEATS} steps: nothing is saved")
    else:
        console.print(f"saved {save_results(rows, machine, 'training')}")


if __name__ == "__main__":
    main()
