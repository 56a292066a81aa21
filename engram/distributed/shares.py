"""How parameters are divided among ranks, and the way from a rank's share to whole tensors and back.

ZeRO lays the parameters of a group out as one flat vector and gives each rank one stretch of it (stages 1 and 2), or
gives each rank one stretch of every parameter (stage 3). What a rank holds of its group is one flat tensor in any case;
pieces tell which of its elements are which of a parameter's.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engram.distributed.world import World
from engram.optim.groups import Assignment
from engram.optim.optimizer import OptimizerStateError, check_saved
from engram.optim.role import Role


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter, on `rank` at [offset, offset + length) of its flat tensor."""

    rank: int
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class Member:
    """A parameter in a share, and where all ranks hold it. No pieces: every rank holds the whole, by itself."""

    assignment: Assignment
    # That of the parameter before it was divided: the parameter's own is empty then.
    shape: torch.Size
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return self.assignment.name

    def pieces_on(self, rank: int) -> Iterator[Piece]:
        """What `rank` holds; where nothing is divided, one piece for whoever asks."""
        if not self.pieces:
            yield Piece(rank, 0, 0, self.shape.numel())
        yield from (piece for piece in self.pieces if piece.rank == rank)


def along_group(sizes: Sequence[int], part: int, ranks: int) -> list[tuple[Piece, ...]]:
    """Pieces of parameters that lie one behind the other, cut into `ranks` parts of `part` elements."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        tuple(
            Piece(rank, low - rank * part, low - start, high - low)
            for rank in range(ranks)
            if (low := max(start, rank * part)) < (high := min(start + size, (rank + 1) * part))
        )
        for start, size in zip(starts, sizes, strict=True)
    ]


def along_parameters(sizes: Sequence[int], ranks: int) -> list[tuple[Piece, ...]]:
    """Pieces of parameters each cut into `ranks` equal parts (the last padded), a rank's parts one behind the other."""
    parts = [math.ceil(size / ranks) for size in sizes]
    offsets = [sum(parts[:index]) for index in range(len(parts))]
    return [
        tuple(
            Piece(rank, offset, rank * part, min(part, size - rank * part))
            for rank in range(ranks)
            if rank * part < size
        )
        for size, part, offset in zip(sizes, parts, offsets, strict=True)
    ]


def in_parts(pieces: Sequence[Piece], parts: int, size: int) -> tuple[Piece, ...]:
    """Pieces of a parameter in `parts` parts of `size` elements, of which the ranks p, p + parts, ... hold part p.

    `pieces`: how those ranks, counted from 0, divide their part among themselves.
    """
    return tuple(
        Piece(piece.rank * parts + part, piece.offset, part * size + piece.start, piece.length)
        for part in range(parts)
        for piece in pieces
    )


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's part of a group of parameters that are updated alike: float32 weights, flat, and their optimizer."""

    weights: Tensor
    members: list[Member]
    role: Role = field(repr=False)
    # The name under which the role keeps state for `weights`.
    key: str

    def states(self) -> dict[str, Tensor]:
        """Optimizer state by its kind (`momentum`, `first_moment`, ...), each as flat as the weights."""
        prefix = f"{self.key}/"
        tensors = self.role.tensors
        return {key.removeprefix(prefix): tensors[key].view(-1) for key in tensors if key.startswith(prefix)}

    def counts(self) -> dict[str, int]:
        """Counts of updates, which the members of a share have in common, keyed as if each had its own."""
        return {
            f"{member.name}/{key.removeprefix(f'{self.key}/')}": count
            for key, count in self.role.counts.items()
            if key.startswith(f"{self.key}/")
            for member in self.members
        }

    def load_counts(self, saved: Mapping[str, int | float]) -> None:
        """Take over the members' counts. A parameter that never had a gradient counts 0 in one process."""
        for key in [key for key in self.role.counts if key.startswith(f"{self.key}/")]:
            kind = key.removeprefix(f"{self.key}/")
            self.role.counts[key] = max(int(saved[f"{member.name}/{kind}"]) for member in self.members)


def whole_tensor(member: Member, flat: Tensor, world: World) -> Tensor:
    """The member's values out of all ranks' flat tensors [elements of the share], in its shape; collective."""
    if not member.pieces:
        return flat.view(member.shape)
    whole = torch.zeros(member.shape.numel(), dtype=flat.dtype, device=world.device)
    flat = flat.reshape(-1)
    for piece in member.pieces_on(world.rank):
        # Several ranks may hold the same piece: the first of them gives it.
        if piece.rank == min(each.rank for each in member.pieces if each.start == piece.start):
            whole[piece.start : piece.start + piece.length] = flat[piece.offset : piece.offset + piece.length]
    # A sum of integers, all but one of them 0, keeps every bit, also those of NaN and -0.
    world.sum(whole.view(torch.int32))
    return whole.view(member.shape)


def copy_pieces(member: Member, flat: Tensor, whole: Tensor, world: World) -> None:
    """Put this rank's pieces of `whole` into its flat tensor."""
    source = whole.reshape(-1)
    for piece in member.pieces_on(world.rank):
        flat[piece.offset : piece.offset + piece.length].copy_(source[piece.start : piece.start + piece.length])


def whole_states(shares: Iterable[Share], world: World) -> Iterator[tuple[str, Tensor]]:
    """(`<parameter>/<state>`, whole tensor) of all optimizer state, one after the other; collective."""
    for share in shares:
        for kind, flat in share.states().items():
            for member in share.members:
                yield f"{member.name}/{kind}", whole_tensor(member, flat, world)


def saved_tensor(saved: Mapping[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    """The tensor of that name in a saved state. Raises OptimizerStateError: missing, or another shape or dtype."""
    if key not in saved:
        raise OptimizerStateError(lacks(key))
    tensor = saved[key]
    check_saved(key, tensor.shape, tensor.dtype, shape, torch.float32)
    return tensor


def lacks(key: str) -> str:
    """What is wrong with a saved state without `key`."""
    return f"the saved state lacks {key}: resume with the model and optim.muon that it was saved with"
