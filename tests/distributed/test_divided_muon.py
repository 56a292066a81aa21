"""Matrices divided among ranks move as whole ones do in one process."""

from pathlib import Path

import pytest
import torch
from torch import Size, Tensor, nn

from engram.config import MuonConfig
from engram.distributed.divided_muon import DividedMuon, Matrix, choose_owners, matrices_of
from engram.distributed.shares import Member, Piece, along_group, along_parameters, copy_pieces, whole_tensor
from engram.distributed.world import World
from engram.optim.groups import Assignment
from engram.optim.muon import Muon
from tests.distributed.ranks import run_ranks, values

# Shape, and matrices below one another: tall, wide, square, several in one, experts.
SHAPES = [((17, 5), 1), ((5, 17), 1), ((9, 9), 1), ((18, 5), 3), ((3, 2, 7, 5), 1), ((5, 3, 7), 1)]
SETTINGS = [
    MuonConfig(newton_schulz_dtype="float32"),
    MuonConfig(newton_schulz_dtype="bfloat16", nesterov=False, momentum=0.8),
]
LR = 0.1


def assignments(weights: list[Tensor]) -> list[Assignment]:
    return [
        Assignment(f"p{index}", nn.Parameter(weight.clone()), "muon", 0.5, 0.2, matrices)
        for index, (weight, (_, matrices)) in enumerate(zip(weights, SHAPES, strict=True))
    ]


def move_divided(
    world: World, weights: list[Tensor], gradients: list[list[Tensor]]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    sizes = [weight.numel() for weight in weights]
    padded = -(-sum(sizes) // world.size) + 1
    found = []
    for settings in SETTINGS:
        for pieces in (along_group(sizes, padded, world.size), along_parameters(sizes, world.size)):
            members = [
                Member(each, Size(shape), own)
                for each, (shape, _), own in zip(assignments(weights), SHAPES, pieces, strict=True)
            ]
            elements = max(piece.offset + piece.length for own in pieces for piece in own) + 2
            flat, flat_gradient = torch.zeros(elements), torch.zeros(elements)
            for member, weight in zip(members, weights, strict=True):
                copy_pieces(member, flat, weight, world)
            role = DividedMuon("muon 0", flat, members, settings, world)
            for step in gradients:
                for member, gradient in zip(members, step, strict=True):
                    copy_pieces(member, flat_gradient, gradient, world)
                flat.grad = flat_gradient.clone()
                role.step(LR)
            momentum = role.tensors["muon 0/momentum"]
            found.append(
                (
                    [whole_tensor(member, flat, world) for member in members],
                    [whole_tensor(member, momentum, world) for member in members],
                )
            )
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_muon_of_one_process(ranks: int, tmp_path: Path) -> None:
    weights = [torch.randn(shape) for shape, _ in SHAPES]
    gradients = [[torch.randn(shape) for shape, _ in SHAPES] for _ in range(2)]
    expected = []
    for settings in SETTINGS:
        own = assignments(weights)
        role = Muon(own, settings)
        for step in gradients:
            for each, gradient in zip(own, step, strict=True):
                each.parameter.grad = gradient.clone()
            role.step(LR)
        expected += 2 * [([each.parameter.detach() for each in own], list(role.tensors.values()))]
    for found in values(run_ranks(ranks, move_divided, weights, gradients, folder=tmp_path)):
        for index, (actual, right) in enumerate(zip(found, expected, strict=True)):
            # In bfloat16, the order of a sum decides about roundings of a hundredth of an update.
            tolerance = 1e-5 if index < 2 else 3e-3
            for each in range(len(SHAPES)):
                torch.testing.assert_close(actual[0][each], right[0][each], atol=tolerance, rtol=0)
                torch.testing.assert_close(actual[1][each], right[1][each], atol=1e-6, rtol=0)


def test_pieces_of_matrices_count_from_their_own_first_element() -> None:
    pieces = (Piece(0, 100, 0, 7), Piece(1, 0, 7, 5))
    member = Member(Assignment("p", nn.Parameter(torch.zeros(4, 3)), "muon", 1.0, 0.0, 2), Size((4, 3)), pieces)
    assert matrices_of(member) == [
        Matrix(2, 3, (Piece(0, 100, 0, 6),)),
        Matrix(2, 3, (Piece(0, 106, 0, 1), Piece(1, 0, 1, 5))),
    ]


def test_whole_matrices_stay_and_divided_ones_share_the_work() -> None:
    whole = Matrix(2, 4, (Piece(1, 0, 0, 8),))
    mostly_of_2 = Matrix(2, 4, (Piece(1, 8, 0, 1), Piece(2, 0, 1, 7)))
    assert choose_owners([whole, mostly_of_2, whole], 3) == [1, 2, 1]
    shape_of_4 = [
        Matrix(3, 5, tuple(Piece(rank, 0, 4 * rank, min(4, 15 - 4 * rank)) for rank in range(4))) for _ in range(8)
    ]
    assert sorted(choose_owners(shape_of_4, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
