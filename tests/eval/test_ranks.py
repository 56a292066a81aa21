"""Shares of processes; what they do together stands in test_scoring.py."""

import pytest

from eval import ranks


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once_and_cost_about_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [1 + place % 9 for place in range(100)]
    parts = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "world", lambda rank=rank: (rank, size))
        parts.append(ranks.own_part(costs))
    assert [place for part in parts for place in part] == list(range(100))
    for part in parts:
        assert abs(sum(costs[place] for place in part) - sum(costs) / size) <= 9


def test_fewer_requests_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for costs in ([], [5]):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(ranks, "world", lambda rank=rank: (rank, 3))
            parts += ranks.own_part(costs)
        assert parts == list(range(len(costs)))


def test_alone() -> None:
    with ranks.together() as rank:
        assert (rank, ranks.world(), ranks.merged({3: "a"})) == (0, (0, 1), {3: "a"})
