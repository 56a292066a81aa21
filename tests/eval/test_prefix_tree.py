"""Shared beginnings: found, cut at whole steps, never past what each row wants for itself."""

from eval.prefix_tree import MAX_DEPTH, MIN_SAVED, STEP, Node, grow


def walk(node: Node) -> list[Node]:
    return [node, *(below for child in node.children for below in walk(child))]


def test_two_levels() -> None:
    prompt = tuple(range(100))
    questions = [prompt + (200 + doc,) * (40 + doc) for doc in range(3)]
    rows = sorted(question + (answer,) * 3 for question in questions for answer in range(4))
    root = grow(rows, [len(row) - 4 for row in rows])
    (shots,) = root.children
    # 100 is no multiple of the step.
    assert (shots.start, shots.end, shots.leaves) == (0, 96, [])
    assert [(node.start, node.end) for node in shots.children] == [(96, 128), (96, 128), (96, 128)]
    assert [node.leaves for node in shots.children] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_every_row_is_a_leaf_below_its_own_beginning() -> None:
    rows = sorted({(n % 2,) * 30 + (n % 3,) * 20 + (n % 5,) * 40 + (n,) for n in range(30)})
    shareable = [len(row) - 1 - index % 7 for index, row in enumerate(rows)]
    seen = []

    def visit(node: Node, beginning: tuple[int, ...]) -> None:
        beginning += rows[node.row][node.start : node.end]
        assert node.end % STEP == 0
        for leaf in node.leaves:
            assert rows[leaf][: node.end] == beginning and node.end <= shareable[leaf]
        seen.extend(node.leaves)
        for child in node.children:
            assert child.start == node.end < child.end
            visit(child, beginning)

    root = grow(rows, shareable)
    visit(root, ())
    assert sorted(seen) == list(range(len(rows)))
    assert len(walk(root)) > 5


def test_nothing_to_share() -> None:
    rows = sorted([(1, 2, 3), (1, 2, 4), (5,) * 90])
    assert grow(rows, [2, 2, 89]) == Node(0, 0, 0, [], [0, 1, 2])
    assert MIN_SAVED > 2


def test_a_node_that_saves_too_little_is_left_out() -> None:
    """Two rows share 16 tokens with a third, and 80 with each other: only the 80 are worth a pass."""
    rows = sorted([(1,) * 16 + (2,) * 80, (1,) * 16 + (3,) * 64 + (4,) * 8, (1,) * 16 + (3,) * 64 + (5,) * 8])
    root = grow(rows, [87] * 3)
    assert root.leaves == [0]
    assert root.children == [Node(1, 0, 80, [], [1, 2])]


def test_nesting_is_bounded() -> None:
    text = tuple(range(4000))
    rows = [text[:end] for end in range(60, 4000, 60)]
    root = grow(rows, [len(row) - 1 for row in rows])
    deepest, node = 0, root
    while node.children:
        deepest, node = deepest + 1, node.children[-1]
    assert deepest <= MAX_DEPTH
