"""Pieces of parameters: every element is somewhere, once, and finds its way back."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Size, Tensor, nn

from engram.distributed.shares import Member, Piece, along_group, along_parameters, copy_pieces, whole_tensor
from engram.distributed.world import SINGLE, World
from engram.optim.groups import Assignment
from tests.distributed.ranks import run_ranks, values

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def assert_each_element_once(sizes: list[int], pieces: list[tuple[Piece, ...]]) -> None:
    places: set[tuple[int, int]] = set()
    for size, own in zip(sizes, pieces, strict=True):
        assert [start for piece in own for start in range(piece.start, piece.start + piece.length)] == list(range(size))
        for piece in own:
            places |= {(piece.rank, offset) for offset in range(piece.offset, piece.offset + piece.length)}
    assert len(places) == sum(sizes), "two elements in one place"


@given(sizes=SIZES, ranks=st.integers(1, 5), padding=st.integers(0, 7))
def test_a_group_in_parts(sizes: list[int], ranks: int, padding: int) -> None:
    part = -(-sum(sizes) // ranks) + padding
    pieces = along_group(sizes, part, ranks)
    assert_each_element_once(sizes, pieces)
    # The flat vector is that of all parameters in order.
    flat = [piece.rank * part + piece.offset + each for own in pieces for piece in own for each in range(piece.length)]
    assert flat == list(range(sum(sizes)))


@given(sizes=SIZES, ranks=st.integers(1, 5))
def test_each_parameter_in_parts(sizes: list[int], ranks: int) -> None:
    pieces = along_parameters(sizes, ranks)
    assert_each_element_once(sizes, pieces)
    for size, own in zip(sizes, pieces, strict=True):
        assert all(piece.length == -(-size // ranks) for piece in own[:-1])


def member(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], matrices: int = 1) -> Member:
    assignment = Assignment(name, nn.Parameter(torch.zeros(shape)), "muon", 1.0, 0.1, matrices)
    return Member(assignment, Size(shape), pieces)


def there_and_back(world: World, whole: list[Tensor]) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in whole]
    found = []
    for pieces in (along_group(sizes, 13, world.size), along_parameters(sizes, world.size)):
        flat = torch.full((20,), 7.0)
        members = [member("x", tuple(tensor.shape), own) for tensor, own in zip(whole, pieces, strict=True)]
        for each, tensor in zip(members, whole, strict=True):
            copy_pieces(each, flat, tensor, world)
        found += [whole_tensor(each, flat, world) for each in members]
    return found


def test_whole_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    whole = [torch.randn(3, 5), torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-42]]), torch.randn(17)]
    for found in values(run_ranks(3, there_and_back, whole, folder=tmp_path)):
        for actual, expected in zip(found, 2 * whole, strict=True):
            assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def test_what_is_not_divided_needs_nobody() -> None:
    flat = torch.arange(6.0)
    assert torch.equal(whole_tensor(member("x", (2, 3), ()), flat, SINGLE), flat.view(2, 3))
