"""Programs of models: what they may do, what they may not, and that only a whole run counts as passed."""

from pathlib import Path

import pytest

from engram.config import UserError
from eval.benchmarks import sandbox
from eval.benchmarks.code import CODE_TASKS
from eval.benchmarks.sandbox import check_available, run_program


@pytest.fixture(autouse=True)
def _available(request: pytest.FixtureRequest) -> None:
    if "without" in request.node.name:
        return
    try:
        check_available()
    except UserError as error:
        pytest.skip(str(error))


def test_a_program_that_ends_has_passed() -> None:
    assert run_program("import math, json\nassert math.gcd(6, 4) == 2\nprint('x' * 100_000)").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("x = 'a' * (1 << 34)", "MemoryError"),
        ("import subprocess; subprocess.run(['true'])", "Popen is refused"),
        ("import os; os.system('true')", "os.system is refused"),
        ("import os; os.fork()", "os.fork is refused"),
    ],
)
def test_a_program_that_does_not_end_has_failed(program: str, reason: str) -> None:
    found = run_program(program)
    assert not found.passed and reason in found.reason


def test_an_endless_program_is_stopped() -> None:
    found = run_program("print('x')\nwhile True: pass", seconds=0.5)
    assert (found.passed, found.reason) == (False, "ran longer than 0.5 s")


def test_files_are_left_alone(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("here")
    for program in (
        f"open({str(kept)!r}, 'w').write('x')",
        f"open({str(new)!r}, 'w').write('x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.open({str(new)!r}, os.O_CREAT | os.O_WRONLY)",
        f"import pathlib; pathlib.Path({str(kept)!r}).rename({str(new)!r})",
    ):
        assert "is refused here" in run_program(program).reason
    assert kept.read_text() == "here" and not new.exists()
    assert run_program(f"assert open({str(kept)!r}).read() == 'here'").passed


def test_there_is_no_network() -> None:
    """The hook refuses sockets; below it, the namespace has no interface but a loopback that is down."""
    assert "socket." in run_program("import socket; socket.create_connection(('127.0.0.1', 9))").reason
    assert run_program("lines = open('/proc/net/dev').read().splitlines()[2:]\nassert len(lines) <= 1, lines").passed


def test_without_isolation_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_available.cache_clear()
    monkeypatch.setattr(sandbox, "_ISOLATED", ("false",))
    with pytest.raises(UserError, match="no network namespace"):
        run_program("pass")
    check_available.cache_clear()


HUMANEVAL = {
    "prompt": 'def double(x):\n    """Twice."""\n',
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}
MBPP = {"text": "Double a number.", "code": "def d(x):\n  return 2 * x", "test_list": ["assert d(2) == 4"]}
CRUX = {"code": "def f(x):\n    return x + 1", "input": "3", "output": "4"}


@pytest.mark.parametrize(
    ("name", "row", "right", "wrong", "prompt"),
    [
        ("humaneval", HUMANEVAL, "    return 2 * x\n", "    return x\n", HUMANEVAL["prompt"]),
        ("mbpp", MBPP, "def d(x):\n  return x + x\n", "def d(x):\n  return x\n", "assert d(2) == 4\n[BEGIN]\n"),
        ("cruxeval_input", CRUX, "3)", "4)", "assert 4 == f("),
        ("cruxeval_output", CRUX, " 4", " 5", "assert f(3) =="),
    ],
)
def test_each_code_benchmark(name: str, row: dict, right: str, wrong: str, prompt: str) -> None:
    task = CODE_TASKS[name]
    assert task.prompt(row, []).endswith(prompt)
    assert run_program(task.program(row, right)).passed
    assert "AssertionError" in run_program(task.program(row, wrong)).reason


def test_shots_of_mbpp() -> None:
    prompt = CODE_TASKS["mbpp"].prompt(MBPP, [MBPP, MBPP])
    assert prompt.count("[DONE]") == 2 and prompt.count("[BEGIN]") == 3 and prompt.count(MBPP["code"]) == 2
