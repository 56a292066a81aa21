"""Tables that every rank holds whole: the sum of all ranks' gradients, the same to the bit on each of them."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from engram.distributed.world import World
from engram.optim.sparse import coalesce


@torch.no_grad()
def sum_table_gradients(tables: Iterable[nn.Parameter], world: World) -> None:
    """Leave on every table its gradient summed over ranks; row-sparse ones travel as rows, and end coalesced."""
    for table in tables:
        gradient = table.grad
        assert gradient is not None, "a table takes part in every forward pass"
        if not gradient.is_sparse:
            world.sum(gradient)
            continue
        gradient = coalesce(gradient)
        if world.size > 1:
            indices = _everybodys(gradient._indices()[0], world)
            values = _everybodys(gradient._values(), world)
            # In the order of ranks, the same for all: so is the order in which rows are summed.
            gradient = torch.sparse_coo_tensor(indices[None], values, gradient.shape, check_invariants=False)
            gradient = coalesce(gradient)
        table.grad = gradient


def _everybodys(rows: Tensor, world: World) -> Tensor:
    """All ranks' rows [n_rank, ...], one rank's below another's; each rank may have another number of them."""
    counts = _counts(len(rows), world)
    # Of equal length, which all backends can gather.
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _counts(count: int, world: World) -> list[int]:
    """Everybody's `count`, in the order of ranks."""
    counts = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    counts[world.rank] = count
    return world.sum(counts).tolist()
