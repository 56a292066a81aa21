"""Variable tracking: a chain of assignments is spread over noise; which variables hold the value?

Wording of the `full` profile: NVIDIA's RULER (Apache-2.0); one solved example goes before the question.
"""

import string
from dataclasses import dataclass
from random import Random

from eval.ruler.haystacks import NOISE, insert
from eval.ruler.sample import Case, Draft, Plan


@dataclass(frozen=True)
class Wording:
    template: str
    answer_prefix: str
    hops: int
    values: range
    # What a name is written as where it is assigned to, or assigned.
    variable: str
    # Letters of a variable's name, in the question and in the example.
    letters: tuple[int, int]
    noise: tuple[str, ...]
    # Lines of noise in the example: with NVIDIA's wording it takes about 500 tokens.
    example_noise: int


FULL = Wording(
    template=(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
        "Find all variables that are assigned the value {query} in the text above."
    ),
    answer_prefix=(
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {query}, they are: "
    ),
    hops=4,
    values=range(10_000, 100_000),
    variable="VAR {}",
    letters=(5, 3),
    noise=(" ".join(NOISE),),
    example_noise=12,
)
TINY = Wording(
    template="Code:\n{context}\nWhich variables are {query}?",
    answer_prefix=" Answer:",
    hops=2,
    values=range(100, 1000),
    variable="{}",
    # Two would stand in any text now and then.
    letters=(3, 3),
    noise=("Here we go.",),
    example_noise=3,
)


def plan(case: Case, wording: Wording) -> Plan:
    """Sizes count lines of noise."""
    random, taken = case.random, set[str]()
    values = random.sample(wording.values, 2)
    names = [_name(random, wording.letters[0], taken) for _ in range(wording.hops + 1)]
    others = [_name(random, wording.letters[1], taken) for _ in range(wording.hops + 1)]
    place, example_place = random.getrandbits(64), random.getrandbits(64)
    example = _fill(wording, others, values[1], wording.example_noise, example_place)
    solved = f"{example.input}{example.answer_prefix} {example.answer}\n\n"

    def build(size: int) -> Draft:
        draft = _fill(wording, names, values[0], size, place)
        return Draft(solved + draft.input, draft.answer_prefix, draft.outputs, draft.answer, draft.marks)

    return Plan(build, smallest=wording.hops + 1)


def _fill(wording: Wording, names: list[str], value: int, size: int, place: int) -> Draft:
    variables = [wording.variable.format(name) for name in names]
    chain = [f"{variables[0]} = {value}"]
    chain += [f"{variable} = {before} " for before, variable in zip(variables, variables[1:], strict=False)]
    lines = insert([wording.noise[i % len(wording.noise)] for i in range(size)], chain, place)
    return Draft(
        input=wording.template.format(context="\n".join(lines), query=value),
        answer_prefix=wording.answer_prefix.format(count=len(names), query=value),
        outputs=tuple(names),
        answer=" ".join(names),
        marks=tuple(f"\n{variable} =" for variable in variables),
    )


def _name(random: Random, letters: int, taken: set[str]) -> str:
    while (name := "".join(random.choices(string.ascii_uppercase, k=letters))) in taken:
        pass
    taken.add(name)
    return name
