"""What many texts begin with, found once: a tree of shared beginnings, so that a model computes each of them once.

Rows that share a few-shot prompt, then a question, then differ in their answers become two levels of nodes and one
leaf for each answer. Nodes end at multiples of `STEP` tokens: beginnings of like length can then share a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# A row computes up to this many shared tokens again.
STEP = 16
# A node is one more pass through the model for whatever stands below it: it must save at least this many tokens.
MIN_SAVED = 48
# Rows that are each other's beginnings, like all prefixes of a text, would nest without end.
MAX_DEPTH = 8


@dataclass(frozen=True)
class Node:
    """Tokens `start` to `end` of any row below; `row` is one of them."""

    row: int
    start: int
    end: int
    children: list["Node"] = field(default_factory=list)
    # Rows whose tokens from `end` on are their own.
    leaves: list[int] = field(default_factory=list)


def grow(rows: Sequence[Sequence[int]], shareable: Sequence[int]) -> Node:
    """The tree of `rows`, which are in lexicographic order; its root is empty.

    Of row n at most the first `shareable[n]` tokens belong to nodes: the states after them are wanted for each row.
    """
    root = Node(0, 0, 0)
    _split(root, list(range(len(rows))), _shared_lengths(rows, shareable), depth=0)
    return root


def _split(node: Node, members: list[int], shared: list[int], depth: int) -> None:
    """Hang `members`, which all begin with the node's tokens, below it."""
    runs: list[list[int]] = []
    for member in members:
        if runs and shared[member] > node.end:
            runs[-1].append(member)
        else:
            runs.append([member])
    for run in runs:
        _hang(node, run, shared, depth)


def _hang(node: Node, run: list[int], shared: list[int], depth: int) -> None:
    if len(run) == 1 or depth == MAX_DEPTH:
        node.leaves.extend(run)
        return
    end = min(shared[member] for member in run[1:])
    if (len(run) - 1) * (end - node.end) >= MIN_SAVED:
        child = Node(run[0], node.end, end)
        node.children.append(child)
        _split(child, run, shared, depth + 1)
        return
    # Not worth a node for all of them, but some may share more.
    first = 0
    for place in range(1, len(run) + 1):
        if place == len(run) or shared[run[place]] == end:
            _hang(node, run[first:place], shared, depth)
            first = place


def _shared_lengths(rows: Sequence[Sequence[int]], shareable: Sequence[int]) -> list[int]:
    """How many tokens each row shares with the row before it, as a multiple of STEP."""
    arrays = [np.asarray(row, np.int64) for row in rows]
    lengths = [0]
    for index in range(1, len(rows)):
        most = min(shareable[index - 1], shareable[index])
        lengths.append(_common(arrays[index - 1][:most], arrays[index][:most]) // STEP * STEP)
    return lengths


def _common(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else len(a)
