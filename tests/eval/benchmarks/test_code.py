"""Programs that are made of answers: what decides right and wrong is the answer, not how it is written."""

import json

import pytest

from eval.benchmarks.code import CODE_TASKS
from eval.benchmarks.convert import convert

ROW = {"code": "def f(x):\n    return x + 1", "input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("task", "answer", "right"),
    [
        ("cruxeval_output", " 2  # one more", True),
        ("cruxeval_output", " 3  # one more", False),
        ("cruxeval_output", " 2", True),
        ("cruxeval_input", "1)", True),
        ("cruxeval_input", "2)", False),
    ],
)
def test_answers_with_comments(task: str, answer: str, right: bool) -> None:
    program = CODE_TASKS[task].program(ROW, answer)
    try:
        exec(program, {})
    except AssertionError:
        assert not right
    else:
        assert right


def test_lines_end_at_line_feeds_alone() -> None:
    """Unicode has other ends of lines, which may stand inside a string of JSON."""
    row = {"question": "one\u2028two\u0085three", "answer": ["x"]}
    assert convert("triviaqa", json.dumps(row, ensure_ascii=False) + "\n\n", "here") == [row]
