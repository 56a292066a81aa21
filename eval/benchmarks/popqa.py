"""PopQA's scores (Mallen et al. 2023): strict equality, which the paper reports, and the authors' looser rule."""

from collections.abc import Mapping, Sequence
from typing import Any


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`exact_match`: the answer is an alias but for case and a closing stop; `contains`: an alias is a substring."""
    answer, aliases = results[0].strip(), doc["answers"]
    strict = answer.rstrip(".").casefold() in {alias.strip().casefold() for alias in aliases}
    # The authors' script looks for the alias as it is, in lower case, and capitalised.
    forms = (form for alias in aliases for form in (alias, alias.lower(), alias.capitalize()))
    return {"exact_match": float(strict), "contains": float(any(form in answer for form in forms))}
