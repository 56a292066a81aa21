"""Muon for matrices that are divided among ranks: momentum stays where the weights are, directions travel.

Each matrix is orthogonalised by one rank, which is sent the pieces of the direction in the dtype of Newton-Schulz, and
sends back the pieces of the result: twice a rank's share in bytes, and an N-th of the work, for N ranks. A matrix that
one rank holds whole goes nowhere. Legend: N matrices in a stack, R rows, C columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, distributed

from engram.config import MuonConfig
from engram.distributed.shares import Member, Piece
from engram.distributed.world import World
from engram.optim.muon import STACK_ELEMENTS, newton_schulz
from engram.optim.role import Role


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter; pieces count elements from its first."""

    rows: int
    columns: int
    pieces: tuple[Piece, ...]

    @property
    def work(self) -> int:
        """Multiplications of one product in Newton-Schulz, the larger ones."""
        return self.rows * self.columns * min(self.rows, self.columns)


@dataclass(frozen=True)
class Span:
    """Elements [offset, offset + length) of a flat tensor, at [position, position + length) of a message."""

    offset: int
    position: int
    length: int


def matrices_of(member: Member) -> list[Matrix]:
    """Matrices that leading dimensions count, and that stand below one another (`Assignment.matrices`)."""
    rows, columns = member.shape[-2] // member.assignment.matrices, member.shape[-1]
    size = rows * columns
    return [
        Matrix(rows, columns, tuple(_part(piece, first, size) for piece in member.pieces if _meet(piece, first, size)))
        for first in range(0, member.shape.numel(), size)
    ]


def _meet(piece: Piece, first: int, size: int) -> bool:
    return piece.start < first + size and first < piece.start + piece.length


def _part(piece: Piece, first: int, size: int) -> Piece:
    """What of a parameter's piece lies in the matrix of elements [first, first + size)."""
    start, end = max(piece.start, first), min(piece.start + piece.length, first + size)
    return Piece(piece.rank, piece.offset + start - piece.start, start - first, end - start)


def choose_owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """For each matrix a rank that holds much of it; of several, the one with the least work so far."""
    work = [0] * ranks
    owners = []
    for matrix in matrices:
        most = max(piece.length for piece in matrix.pieces)
        # The last part is shorter where a parameter does not divide evenly: that must not spare a rank all work.
        owner = min((piece.rank for piece in matrix.pieces if 2 * piece.length >= most), key=lambda rank: work[rank])
        work[owner] += matrix.work
        owners.append(owner)
    return owners


class DividedMuon(Role):
    """The update of `engram.optim.muon.Muon` on this rank's flat share [elements] of some parameters.

    All ranks must call `step` together; every matrix has a gradient.
    """

    def __init__(
        self, key: str, weights: Tensor, members: Sequence[Member], settings: MuonConfig, world: World
    ) -> None:
        super().__init__([])
        self.weights = weights
        self.settings = settings
        self.world = world
        self.dtype = getattr(torch, settings.newton_schulz_dtype)
        first = members[0].assignment
        self.lr_multiplier, self.weight_decay = first.lr_multiplier, first.weight_decay
        self.momentum = torch.zeros_like(weights, requires_grad=False)
        self.tensors[f"{key}/momentum"] = self.momentum
        self._plan([matrix for member in members for matrix in matrices_of(member)])

    def _plan(self, matrices: list[Matrix]) -> None:
        """Who orthogonalises what, and the order of pieces in messages: by matrix, between each two ranks."""
        rank = self.world.rank
        owners = choose_owners(matrices, self.world.size)
        sent = [
            (owner, piece, _scale(matrix))
            for matrix, owner in zip(matrices, owners, strict=True)
            for piece in matrix.pieces
            if piece.rank == rank
        ]
        sent.sort(key=lambda each: each[0])
        self.send_counts = self._counts([(owner, piece) for owner, piece, _ in sent])
        positions = accumulate((piece.length for _, piece, _ in sent), initial=0)
        # What of the flat share goes into which place of the message, and the size of its update.
        self.sent = [
            (Span(piece.offset, position, piece.length), scale)
            for (_, piece, scale), position in zip(sent, positions, strict=False)
        ]
        self.own = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
        received = [(piece.rank, index, piece) for index, own in enumerate(self.own) for piece in own.pieces]
        received.sort(key=lambda each: each[0])
        self.receive_counts = self._counts([(source, piece) for source, _, piece in received])
        positions = accumulate((piece.length for _, _, piece in received), initial=0)
        # For each own matrix, where its elements lie in what is received.
        self.received: list[list[Span]] = [[] for _ in self.own]
        for (_, index, piece), position in zip(received, positions, strict=False):
            self.received[index].append(Span(piece.start, position, piece.length))

    def _counts(self, pieces: list[tuple[int, Piece]]) -> list[int]:
        counts = [0] * self.world.size
        for rank, piece in pieces:
            counts[rank] += piece.length
        return counts

    @torch.no_grad()
    def step(self, lr: float) -> None:
        gradient = self.weights.grad
        assert gradient is not None
        lr = lr * self.lr_multiplier
        self.momentum.lerp_(gradient, 1 - self.settings.momentum)
        direction = gradient.lerp(self.momentum, self.settings.momentum) if self.settings.nesterov else self.momentum
        message = torch.empty(sum(self.send_counts), dtype=self.dtype, device=direction.device)
        for span, _ in self.sent:
            message[span.position : span.position + span.length] = direction[span.offset : span.offset + span.length]
        # Weights in host memory: the device of the model computes all the same.
        message = message.to(self.world.device)
        directions = self._exchange(message, self.send_counts, self.receive_counts)
        self._orthogonalise(directions)
        update = self._exchange(directions, self.receive_counts, self.send_counts).to(self.weights.device)
        self.weights.mul_(1 - lr * self.weight_decay)
        for span, scale in self.sent:
            self.weights[span.offset : span.offset + span.length].add_(
                update[span.position : span.position + span.length], alpha=-lr * self.settings.update_rms * scale
            )

    def _exchange(self, message: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        received = torch.empty(sum(receive_counts), dtype=message.dtype, device=message.device)
        distributed.all_to_all_single(received, message, receive_counts, send_counts)
        return received

    def _orthogonalise(self, directions: Tensor) -> None:
        """Overwrite this rank's own matrices, in the order in which they were received."""
        for rows, columns, stack in self._stacks():
            stack_NRC = torch.empty(len(stack), rows, columns, dtype=self.dtype, device=directions.device)
            flat_NE = stack_NRC.flatten(1)
            for flat_E, spans in zip(flat_NE, stack, strict=True):
                for span in spans:
                    flat_E[span.offset : span.offset + span.length] = directions[
                        span.position : span.position + span.length
                    ]
            wide_NRC = stack_NRC.mT.contiguous() if rows > columns else stack_NRC
            orthogonal_NRC = newton_schulz(wide_NRC, self.settings.newton_schulz_steps)
            result_NE = (orthogonal_NRC.mT if rows > columns else orthogonal_NRC).flatten(1)
            for flat_E, spans in zip(result_NE, stack, strict=True):
                for span in spans:
                    directions[span.position : span.position + span.length] = flat_E[
                        span.offset : span.offset + span.length
                    ]

    def _stacks(self) -> Iterator[tuple[int, int, list[list[Span]]]]:
        """Own matrices of one shape together, as many as a stack may hold."""

        def shape(own: tuple[Matrix, list[Span]]) -> tuple[int, int]:
            return own[0].rows, own[0].columns

        pairs = sorted(zip(self.own, self.received, strict=True), key=shape)
        for (rows, columns), same in groupby(pairs, key=shape):
            spans = [spans for _, spans in same]
            most = max(1, STACK_ELEMENTS // (rows * columns))
            for first in range(0, len(spans), most):
                yield rows, columns, spans[first : first + most]


def _scale(matrix: Matrix) -> float:
    return math.sqrt(max(matrix.rows, matrix.columns))
