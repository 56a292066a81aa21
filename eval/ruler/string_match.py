"""RULER's scores of a generated text, as NVIDIA computes them: whether the outputs stand in it, in any case.

string_match_all = mean over the outputs; string_match_part = 1 where any output stands there (outputs are aliases).
lm-evaluation-harness takes a mean over aliases instead, so its numbers for questions are lower.
"""

import re
from collections.abc import Sequence


def clean(text: str) -> str:
    """The text as it is scored: stripped, control characters as line feeds."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def string_match_all(text: str, outputs: Sequence[str]) -> float:
    """Share of the outputs that stand in `text`."""
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def string_match_part(text: str, outputs: Sequence[str]) -> float:
    """1 where one of the outputs stands in `text`, else 0."""
    return float(any(output.lower() in text.lower() for output in outputs))


def string_match(text: str, outputs: Sequence[str], match: str) -> float:
    """One of the two, by name: `all` or `part`."""
    return {"all": string_match_all, "part": string_match_part}[match](clean(text), outputs)
