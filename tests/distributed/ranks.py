"""Run a function on several gloo ranks, each a process of its own, and look at what all of them return."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A rank that waits for one that is gone gives up after this long.
TIMEOUT_SECONDS = 60


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, folder: Path, timeout_seconds: int = TIMEOUT_SECONDS
) -> list[Any]:
    """function(world, *arguments) on `size` ranks -> what each returned, or the exception that it raised, in order.

    `function` must be importable (defined at the top of a module); results travel through files in `folder`.
    """
    port = _free_port()
    # A server that has imported once what takes seconds, and has no threads, is forked for each rank.
    context = multiprocessing.get_context("forkserver")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context.set_forkserver_preload(
        ["deepspeed", "torch._dynamo", "engram.training.ranked", "engram.training.ranked_engine"]
    )
    processes = [
        context.Process(
            target=_work, args=(rank, size, port, str(folder), timeout_seconds, function, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(4 * TIMEOUT_SECONDS)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} did not end"
    return [_result(folder / f"rank_{rank}.pt", processes[rank].exitcode) for rank in range(size)]


def values(results: list[Any]) -> list[Any]:
    """The results, none of which may be an exception."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _work(
    rank: int, size: int, port: int, folder: str, timeout: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from engram.distributed.world import join_world

    try:
        with join_world(torch.device("cpu"), timeout) as world:
            result = function(world, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = _portable(error)
    torch.save(result, Path(folder) / f"rank_{rank}.pt")


def _portable(error: Exception) -> Exception:
    """The exception itself where it survives pickling, else one with its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")


def _result(path: Path, exit_code: int | None) -> Any:
    if not path.exists():
        return RuntimeError(f"the process ended with status {exit_code} and no result")
    return torch.load(path, weights_only=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
