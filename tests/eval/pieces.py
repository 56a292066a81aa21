"""A tokenizer of words, spaces and single digits for tests, and a reader that solves RULER's tasks by regular
expressions."""

import re
from collections import Counter

from eval.ruler.sample import Sample


class Pieces:
    """Encodes a text as its pieces, numbered as they come; equal pieces have equal ids."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        return [self._ids.setdefault(piece, len(self._ids)) for piece in re.findall(r" ?[A-Za-z]+|\d|\s|.", text)]


def solve(sample: Sample) -> list[str]:
    """The answer, found in the prompt alone."""
    family = sample.task.split("_")[0]
    return {"niah": _needles, "vt": _variables, "cwe": _common, "fwe": _frequent, "qa": _town}[family](sample.prompt)


def _needles(prompt: str) -> list[str]:
    context, question = prompt.rsplit("\nWhat", 1)
    keys = re.search(r"for (.*?)(?: mentioned|\?)", question)
    assert keys
    found = []
    for key in re.split(r",? and |, ", keys[1]):
        found += re.findall(rf" for {re.escape(key)} is:? ([\w-]+) ?\.", context)
    return found


def _variables(prompt: str) -> list[str]:
    value = re.findall(r"\d+", prompt)[-1]
    held = {value}
    for name, source in re.findall(r"\n(?:VAR )?([A-Z]+) = (?:VAR )?(\w+)", prompt):
        if source in held:
            held.add(name)
    return sorted(held - {value})


def _common(prompt: str) -> list[str]:
    lists = re.findall(r"\n((?:\d+\. [a-z-]+ ?)+)\n", prompt)
    return _most_common(re.findall(r"\d+\. ([a-z-]+)", lists[-1]), len(re.findall(r"\d+\. ", _solved(prompt))))


def _solved(prompt: str) -> str:
    """The example's answer."""
    return prompt.split("Answer:", 1)[1].split("\n", 1)[0].split(":")[-1]


def _frequent(prompt: str) -> list[str]:
    text = re.search(r"(?:Coded text:|coded words\.) (.*)\n", prompt)
    assert text
    return _most_common([word for word in text[1].split() if word != "..."], 3)


def _most_common(words: list[str], number: int) -> list[str]:
    ranked = Counter(words).most_common(number + 1)
    assert ranked[number - 1][1] > ranked[number][1], "the answer is not unique"
    return [word for word, _ in ranked[:number]]


def _town(prompt: str) -> list[str]:
    name = re.findall(r"employer of (\w+) live|does (\w+) live", prompt)[-1]
    person = name[0] or name[1]
    if name[0]:
        person = re.findall(rf"{person} works for (\w+)\.", prompt)[0]
    return re.findall(rf"{person} lives in (\w+)\.", prompt)
