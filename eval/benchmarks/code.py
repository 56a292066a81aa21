"""Benchmarks whose answers are programs: HumanEval, MBPP and CruxEval as prompts, and as programs that must not fail.

Prompts are those of the benchmarks' authors for models that complete text; answers are greedy, one for each problem.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram.config import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CodeTask:
    """`prompt(row, shots)`, the strings that end an answer, and `program(row, answer)`, which fails if it is wrong."""

    prompt: Callable[[Row, Sequence[Row]], str]
    stops: tuple[str, ...]
    program: Callable[[Row, str], str]
    max_new_tokens: int


def _humaneval_program(row: Row, answer: str) -> str:
    return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})\n"


def _mbpp_problem(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp_prompt(row: Row, shots: Sequence[Row]) -> str:
    return "".join(f"{_mbpp_problem(one)}{one['code']}\n[DONE]\n\n" for one in shots) + _mbpp_problem(row)


def _mbpp_program(row: Row, answer: str) -> str:
    return "\n".join([row.get("test_setup_code") or "", answer, *row["test_list"]]) + "\n"


# Austin et al. 2021 end at [DONE]; Chen et al. 2021 where a next thing at the top level begins.
_HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")

CODE_TASKS: dict[str, CodeTask] = {
    "humaneval": CodeTask(lambda row, shots: row["prompt"], _HUMANEVAL_STOPS, _humaneval_program, 512),
    "mbpp": CodeTask(_mbpp_prompt, ("[DONE]",), _mbpp_program, 512),
    "cruxeval_input": CodeTask(
        lambda row, shots: f"{row['code']}\n\nassert {row['output']} == f(",
        ("\n",),
        lambda row, answer: f"{row['code']}\nassert {row['output']} == f({answer}\n",
        64,
    ),
    "cruxeval_output": CodeTask(
        lambda row, shots: f"{row['code']}\n\nassert f({row['input']}) ==",
        ("\n",),
        lambda row, answer: f"{row['code']}\nassert f({row['input']}) == ({answer.strip()}\n)\n",
        64,
    ),
}


def check_rows(name: str, rows: Sequence[Row], where: str) -> None:
    """Raises UserError for a row that lacks what the benchmark's prompts and programs are made of."""
    task = CODE_TASKS[name]
    for number, row in enumerate(rows):
        try:
            task.prompt(row, ())
            task.program(row, "")
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: row {number} is not one of {name} ({type(error).__name__}: {error}): add the original data"
            ) from None
