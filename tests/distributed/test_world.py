"""What one rank suffers, all ranks learn."""

import time
from pathlib import Path

import torch

from engram.config import ConfigError
from engram.distributed.world import SINGLE, RankError, World
from tests.distributed.ranks import run_ranks, values


def collectives(world: World) -> tuple[list[int], float, bool, bool]:
    total = world.sum(torch.tensor(world.rank + 1.0))
    return world.gather(10 * world.rank), total.item(), world.any(world.rank == 1), world.any(False)


def test_collectives_reach_all_ranks(tmp_path: Path) -> None:
    assert values(run_ranks(3, collectives, folder=tmp_path)) == 3 * [([0, 10, 20], 6.0, True, False)]


def test_one_rank_alone_communicates_with_nobody() -> None:
    assert collectives(SINGLE) == ([0], 1.0, False, False)


def fail_on_rank_1(world: World) -> str:
    with world.together():
        if world.rank == 1:
            raise ConfigError("id 7 of 5")
    return "went on"


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, failed, last = run_ranks(3, fail_on_rank_1, folder=tmp_path)
    assert (type(first), str(first)) == (RankError, "rank 1: id 7 of 5")
    assert (type(failed), str(failed)) == (ConfigError, "id 7 of 5")
    assert str(last) == "rank 1: id 7 of 5"


def differ(world: World) -> None:
    world.agree("the colour", "same", "never raised")
    world.agree("the shape", ["round", "round", "square"][world.rank], "make them equal")


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    for error in run_ranks(3, differ, folder=tmp_path):
        assert str(error) == "the shape differs: rank 0 has round, rank 2 has square: make them equal"


def first_and_in_turn(world: World, folder: Path) -> tuple[str, bool]:
    said = world.first_says(lambda: f"rank {world.rank} says")
    mark = folder / "made"

    def make() -> bool:
        found = mark.exists()
        mark.touch()
        return found

    return said, world.in_turn(make)


def test_the_first_rank_speaks_and_goes_ahead(tmp_path: Path) -> None:
    results = values(run_ranks(2, first_and_in_turn, tmp_path, folder=tmp_path))
    assert results == [("rank 0 says", False), ("rank 0 says", True)]


def first_fails(world: World) -> None:
    world.first_says(lambda: int("x"))


def test_what_fails_on_the_first_rank_fails_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, first_fails, folder=tmp_path)
    assert type(first) is ValueError
    assert str(second) == "rank 0: invalid literal for int() with base 10: 'x'"


def wait_for_the_first(world: World) -> tuple[str, bool]:
    """It works for longer than a message of a step may take: at first while others wait for its word, then not."""

    def work() -> str:
        time.sleep(4)
        return "done"

    said = world.first_says(work)
    if world.is_first:
        time.sleep(4)
    try:
        world.sum(torch.ones(1))
    except RuntimeError:
        return said, False
    return said, True


def test_ranks_wait_for_long_work_but_not_for_a_message(tmp_path: Path) -> None:
    results = values(run_ranks(2, wait_for_the_first, folder=tmp_path, timeout_seconds=2))
    assert [said for said, _ in results] == ["done", "done"]
    assert not results[1][1]
